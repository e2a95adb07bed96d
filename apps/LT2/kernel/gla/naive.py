"""Gated linear attention token by token, as https://arxiv.org/abs/2312.06635 writes it.

This is the definition that every other form is tested against. A Python loop over tokens: use it
to check, not to train. Shapes: B batch, T tokens, N sequences, H heads, K key and V value width.
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
    """Same arguments and results as `gla`; fp64 inputs are computed in fp64."""

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
