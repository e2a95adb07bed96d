"""The attention probability of the first token, an attention sink
(https://arxiv.org/abs/2309.17453)."""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.attention.naive import visible_keys
from apps.LT2.kernel.documents import local_positions

MAX_QUERIES = 128  # per row; only their fp32 scores are in memory


@torch.no_grad()
def first_token_mass(
    q_BTHK: Tensor, k_BTHK: Tensor, *, window: int | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Return the probability that queries give to their document's first key, (B, H, Q) fp32.

    q           (B, T, H, K)
    k           (B, T, Hkv, K), Hkv divides H
    window      keys a query sees, itself included; the probability of a hidden first key is 0
    cu_seqlens  (n_docs + 1,) int32 with B = 1; if None, every row is one document
    Q is min(T, MAX_QUERIES); the queries are the middles of Q equal parts of the row. Each softmax
    is exact, over all keys that the query sees.
    """
    n_tokens, head_dim = q_BTHK.shape[1], q_BTHK.shape[3]
    n_kv_heads, device = k_BTHK.shape[2], q_BTHK.device
    n_queries = min(n_tokens, MAX_QUERIES)
    queries = (2 * torch.arange(n_queries, device=device) + 1) * n_tokens // (2 * n_queries)
    q = q_BTHK[:, queries].unflatten(2, (n_kv_heads, -1))  # B Q G H/G K
    scores = torch.einsum("bqgnk,bsgk->bgnqs", q.float(), k_BTHK.float()) * head_dim**-0.5
    visible = visible_keys(
        n_tokens, window=window, cu_seqlens=cu_seqlens, device=device, queries=queries
    )
    scores.masked_fill_(~visible, float("-inf"))
    first = queries - local_positions(n_tokens, cu_seqlens, device)[queries]
    score_of_first = scores.gather(-1, first.expand(scores.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    return (score_of_first - scores.logsumexp(-1)).exp().flatten(1, 2)
