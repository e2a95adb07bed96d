"""The gated delta rule token by token, as https://arxiv.org/abs/2412.06464 writes it.

This is the definition that every other form is tested against. A Python loop over tokens: use it
to check, not to train. Shapes: B batch, T tokens, N sequences, H heads, K key and V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta_rule_naive(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `gated_delta_rule`; fp64 inputs are computed in fp64."""
    dtype = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    n_sequences = len(v_BTHV) if cu_seqlens is None else len(cu_seqlens) - 1
    size = (n_sequences, *q_BTHK.shape[2:], v_BTHV.shape[-1])
    zeros = torch.zeros(size, dtype=dtype, device=v_BTHV.device)
    states = zeros if state is None else state.to(dtype)
    inputs = [x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH)]
    if cu_seqlens is None:
        results = [_recurrence(inputs, states)]
    else:
        bounds = cu_seqlens.tolist()
        results = [
            _recurrence([x[:, start:end] for x in inputs], states[n : n + 1])
            for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        ]
    o_BTHV = torch.cat([o for o, _ in results], dim=1)
    return o_BTHV.to(v_BTHV.dtype), torch.cat([s for _, s in results])


def _recurrence(inputs: list[Tensor], S_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH = inputs
    scale = q_BTHK.shape[-1] ** -0.5
    o_BTHV = []
    for t in range(q_BTHK.shape[1]):
        q_BHK, k_BHK, v_BHV = q_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t]
        S_BHKV = S_BHKV * g_BTH[:, t].exp()[..., None, None]
        read_BHV = torch.einsum("bhk,bhkv->bhv", k_BHK, S_BHKV)
        write_BHV = (v_BHV - read_BHV) * beta_BTH[:, t, :, None]
        S_BHKV = S_BHKV + torch.einsum("bhk,bhv->bhkv", k_BHK, write_BHV)
        o_BTHV.append(torch.einsum("bhk,bhkv->bhv", q_BHK * scale, S_BHKV))
    return torch.stack(o_BTHV, dim=1) if o_BTHV else v_BTHV, S_BHKV
