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
    inputs = [x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH)]
    if cu_seqlens is None:
        sequences = [inputs]
        states = [_initial_state(state, inputs)]
    else:
        bounds = cu_seqlens.tolist()
        spans = list(zip(bounds[:-1], bounds[1:], strict=True))
        sequences = [[x[:, start:end] for x in inputs] for start, end in spans]
        states = [
            _initial_state(None if state is None else state[n : n + 1], inputs)
            for n in range(len(spans))
        ]
    results = [_recurrence(*xs, s) for xs, s in zip(sequences, states, strict=True)]
    o_BTHV = torch.cat([o for o, _ in results], dim=1)
    return o_BTHV.to(v_BTHV.dtype), torch.cat([s for _, s in results])


def _initial_state(state: Tensor | None, inputs: list[Tensor]) -> Tensor:
    q_BTHK, _, v_BTHV = inputs[:3]
    if state is None:
        B, _, H, K = q_BTHK.shape
        return v_BTHV.new_zeros(B, H, K, v_BTHV.shape[-1])
    return state.to(v_BTHV.dtype)


def _recurrence(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, S_BHKV) -> tuple[Tensor, Tensor]:
    scale = q_BTHK.shape[-1] ** -0.5
    outputs = []
    for t in range(q_BTHK.shape[1]):
        q, k, v = q_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t]
        S_BHKV = S_BHKV * g_BTH[:, t].exp()[..., None, None]
        read_BHV = torch.einsum("bhk,bhkv->bhv", k, S_BHKV)
        write_BHV = (v - read_BHV) * beta_BTH[:, t, :, None]
        S_BHKV = S_BHKV + torch.einsum("bhk,bhv->bhkv", k, write_BHV)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q * scale, S_BHKV))
    if not outputs:
        return torch.zeros_like(v_BTHV), S_BHKV
    return torch.stack(outputs, dim=1), S_BHKV
