"""The definition of DeepSeek sparse attention (https://arxiv.org/abs/2512.02556), dense in fp32.

Autograd gives its gradients. Shapes: B batch, T queries, S >= T keys (the queries are the last T of
S tokens), H query heads, G key/value heads, K head dim, J index heads, C index dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.arguments import wide_dtype
from apps.LT2.kernel.attention.naive import visible_keys
from apps.LT2.kernel.dsa.selection import Index
from lingua.transformer import repeat_kv


def dsa_naive(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    index: Index,
    *,
    top_k: int | None,
    cu_seqlens: Tensor | None = None,
    with_loss: bool = False,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run `dsa`. `selected` (B, T, S) bool replaces the indexer's choice, also in its loss."""
    dtype, wide = q_BTHK.dtype, wide_dtype(q_BTHK.dtype)
    n_queries, n_keys = q_BTHK.shape[1], k_BSGK.shape[1]
    groups = q_BTHK.shape[2] // k_BSGK.shape[2]
    q, index = q_BTHK.to(wide), Index(*(x.to(wide) for x in index))
    k, v = (repeat_kv(x.to(wide), groups) for x in (k_BSGK, v_BSGK))

    visible = visible_keys(n_keys, window=None, cu_seqlens=cu_seqlens, device=q.device)
    visible = visible[n_keys - n_queries :]
    products = torch.einsum("btjc,bsc->btjs", index.q_BTJC, index.k_BSC).relu()
    scores = torch.einsum("btjs,btj->bts", products, index.w_BTJ)
    if selected is None:
        selected = _largest(scores.detach(), visible, top_k)

    logits = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    p = logits.masked_fill(~selected[:, None], float("-inf")).softmax(-1)
    o = torch.einsum("bhts,bshk->bthk", p, v).to(dtype)
    if not with_loss:
        return o, None
    target = p.detach().sum(1)
    target = target / target.sum(-1, keepdim=True)
    log_guess = scores.masked_fill(~selected, float("-inf")).log_softmax(-1)
    terms = torch.xlogy(target, target) - target * log_guess.masked_fill(~selected, 0)
    return o, terms.sum(-1).mean()


def _largest(scores_BTS: Tensor, visible: Tensor, top_k: int | None) -> Tensor:
    """Return the top_k visible keys of each query, (B, T, S) bool; later keys win ties."""
    visible = visible.expand_as(scores_BTS)
    if top_k is None:
        return visible
    scores = scores_BTS.masked_fill(~visible, float("-inf"))
    from_last = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = scores.shape[-1] - 1 - from_last
    largest = torch.zeros_like(visible).scatter_(-1, order[..., :top_k], True)
    return largest & visible
