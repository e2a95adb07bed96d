"""Linear attention with one decay per head token by token: equation 1 of RetNet
(https://arxiv.org/abs/2307.08621), with a decay that may depend on the token.

The definition that all other forms are tested against: a Python loop over tokens, for tests only.
Shapes: B batch, T tokens, N sequences, H heads, G groups of heads that share q and k, K key and V
value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.documents import by_document
from lingua.transformer import repeat_kv


def simple_gla_naive(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `simple_gla` in fp32, or in fp64 for fp64 inputs."""

    def recurrence(inputs: list[Tensor], S_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        q_BTHK, k_BTHK, v_BTHV, g_BTH = inputs
        o_BTHV = []
        for t in range(q_BTHK.shape[1]):
            write_BHKV = torch.einsum("bhk,bhv->bhkv", k_BTHK[:, t], v_BTHV[:, t])
            S_BHKV = S_BHKV * g_BTH[:, t, :, None, None].exp() + write_BHKV
            o_BTHV.append(scale * torch.einsum("bhk,bhkv->bhv", q_BTHK[:, t], S_BHKV))
        return torch.stack(o_BTHV, dim=1) if o_BTHV else v_BTHV, S_BHKV

    B, T, H, V = v_BTHV.shape
    q_BTHK, k_BTHK = (repeat_kv(x, H // x.shape[2]) for x in (q_BTGK, k_BTGK))
    inputs = (q_BTHK, k_BTHK, v_BTHV, g.expand(B, T, H))
    state_shape = (H, q_BTHK.shape[-1], V)
    return by_document(recurrence, inputs, state_shape, state, cu_seqlens, v_BTHV.dtype)
