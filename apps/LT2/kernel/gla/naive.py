"""Gated linear attention token by token, as https://arxiv.org/abs/2312.06635 defines it.

The definition that all other forms are tested against: a Python loop over tokens, for tests only.
Shapes: B batch, T tokens, N sequences, H heads, K key and V value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.documents import by_document


def gla_naive(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `gla` in fp32, or in fp64 for fp64 inputs."""

    def recurrence(inputs: list[Tensor], S_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        q_BTHK, k_BTHK, v_BTHV, g_BTHK = inputs
        o_BTHV = []
        for t in range(q_BTHK.shape[1]):
            write_BHKV = torch.einsum("bhk,bhv->bhkv", k_BTHK[:, t], v_BTHV[:, t])
            S_BHKV = S_BHKV * g_BTHK[:, t].exp()[..., None] + write_BHKV
            o_BTHV.append(scale * torch.einsum("bhk,bhkv->bhv", q_BTHK[:, t], S_BHKV))
        return torch.stack(o_BTHV, dim=1) if o_BTHV else v_BTHV, S_BHKV

    inputs = (q_BTHK, k_BTHK, v_BTHV, g_BTHK)
    state_shape = (*q_BTHK.shape[2:], v_BTHV.shape[-1])
    return by_document(recurrence, inputs, state_shape, state, cu_seqlens, v_BTHV.dtype)
