"""Kimi delta attention token by token, as https://arxiv.org/abs/2510.26692 defines it.

The definition that all other forms are tested against: a Python loop over tokens, for tests only.
Shapes: B batch, T tokens, N sequences, H heads, K key and V value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.documents import by_document


def kda_naive(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `kda` in fp32, or in fp64 for fp64 inputs."""
    inputs = (q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH)
    state_shape = (*q_BTHK.shape[2:], v_BTHV.shape[-1])
    return by_document(_recurrence, inputs, state_shape, state, cu_seqlens, v_BTHV.dtype)


def _recurrence(inputs: list[Tensor], S_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH = inputs
    scale = q_BTHK.shape[-1] ** -0.5
    o_BTHV = []
    for t in range(q_BTHK.shape[1]):
        q_BHK, k_BHK, v_BHV = q_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t]
        S_BHKV = S_BHKV * g_BTHK[:, t].exp()[..., None]
        old_BHV = torch.einsum("bhk,bhkv->bhv", k_BHK, S_BHKV)
        write_BHV = (v_BHV - old_BHV) * beta_BTH[:, t, :, None]
        S_BHKV = S_BHKV + torch.einsum("bhk,bhv->bhkv", k_BHK, write_BHV)
        o_BTHV.append(torch.einsum("bhk,bhkv->bhv", q_BHK * scale, S_BHKV))
    return torch.stack(o_BTHV, dim=1) if o_BTHV else v_BTHV, S_BHKV
