"""The definition of softmax attention: dense scores in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.documents import document_of_tokens
from lingua.transformer import repeat_kv


def visible_keys(
    n_tokens: int,
    *,
    window: int | None,
    cu_seqlens: Tensor | None,
    device: torch.device | str,
    queries: Tensor | None = None,
) -> Tensor:
    """Return (T, T) bool, whether query t sees key s; or its rows `queries` (Q,) int64.

    window 2, documents of 3 and 2 tokens      a b c d e
                                           a   1
                                           b   1 1
                                           c     1 1
                                           d         1
                                           e         1 1
    """
    position = torch.arange(n_tokens, device=device)
    rows = position if queries is None else queries
    distance = rows[:, None] - position[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if cu_seqlens is not None:
        document, _ = document_of_tokens(cu_seqlens, n_tokens)
        visible &= document[rows, None] == document[None, :]
    return visible


def naive_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    *,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v over the visible keys: (B, T, H, K) in q's dtype."""
    n_tokens, n_heads, head_dim = q_BTHK.shape[1:]
    groups = n_heads // k_BTHK.shape[2]
    k_BTHK, v_BTHK = repeat_kv(k_BTHK, groups), repeat_kv(v_BTHK, groups)
    scores = torch.einsum("bthk,bshk->bhts", q_BTHK.float(), k_BTHK.float()) * head_dim**-0.5
    visible = visible_keys(n_tokens, window=window, cu_seqlens=cu_seqlens, device=q_BTHK.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights, v_BTHK.float()).type_as(q_BTHK)
