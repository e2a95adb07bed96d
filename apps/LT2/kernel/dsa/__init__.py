"""DeepSeek sparse attention (https://arxiv.org/abs/2512.02556).

    I(t, s) = sum_j w(t, j) ReLU(q_I(t, j) . k_I(s))          the lightning indexer
    o(t)    = attention of q(t) over the top_k keys s <= t with the largest I(t, s)
    loss    = mean over t of KL(p(t) || softmax I(t))         p: the attention's distribution

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head dim, J index heads, C
index dim.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from apps.LT2.kernel.attention import decode_attention
from apps.LT2.kernel.dsa.naive import dsa_naive
from apps.LT2.kernel.dsa.operator import dsa_blocked, kernels_support
from apps.LT2.kernel.dsa.selection import (
    Index,
    head_products,
    index_scores,
    select_top_k,
    selected_indices,
)

IMPLS = {
    "naive": dsa_naive,
    "blocked": dsa_blocked,
    "triton": partial(dsa_blocked, use_kernels=True),
}

__all__ = ["Index", "dsa", "dsa_step"]


def dsa(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    index: Index,
    *,
    top_k: int | None,
    cu_seqlens: Tensor | None = None,
    with_loss: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend causally with T queries, the last of S tokens, to the keys that the indexer selects.

    q           (B, T, H, K)   multiplied by K**-0.5
    k, v        (B, S, G, K)   G divides H
    index.q     (B, T, J, C)
    index.k     (B, S, C)
    index.w     (B, T, J)      fp32; the caller scales it by (J C)**-0.5
    top_k       keys selected per query; None = all visible keys (dense warm-up)
    cu_seqlens  (n_docs + 1,)  int32 offsets of packed documents; then B is 1 and S is T
    impl        "naive", "blocked" (plain torch), "triton" (16-bit CUDA tensors with S = T), or
                "auto": triton if it supports the tensors, else blocked
    Returns o (B, T, H, K) in q's dtype and the indexer's loss, an fp32 scalar; None without
    `with_loss`. fp64 inputs are computed in fp64.
    The loss compares distributions over the selected keys. p is the mean of the heads'
    probabilities and is a constant. o is differentiable in q, k and v only, the loss in index.q,
    index.k and index.w only. Of keys with equal scores the later one is selected.
    """
    _check_shapes(q_BTHK, k_BSGK, v_BSGK, index, top_k, cu_seqlens)
    if impl == "auto":
        impl = "triton" if kernels_support(q_BTHK, k_BSGK, index) else "blocked"
    assert impl in IMPLS, f"impl must be auto or one of {list(IMPLS)}, got {impl!r}"
    supported = impl != "triton" or kernels_support(q_BTHK, k_BSGK, index)
    assert supported, f"impl='triton' does not support {q_BTHK.dtype} on {q_BTHK.device}, or T != S"
    return IMPLS[impl](
        q_BTHK, k_BSGK, v_BSGK, index, top_k=top_k, cu_seqlens=cu_seqlens, with_loss=with_loss
    )


@torch.no_grad()
def dsa_step(
    q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, index: Index, n_valid_B: Tensor, *, top_k: int
) -> Tensor:
    """Attend with one query per row to the first n_valid of S cached keys; returns (B, H, K).

    `index` as in `dsa` with T = 1. Reads all index keys, and top_k keys and values. No shape
    depends on n_valid. q is multiplied by K**-0.5.
    """
    n_slots = k_BSGK.shape[1]
    n_read = n_valid_B
    if top_k < n_slots:
        visible = torch.arange(n_slots, device=q_BHK.device) < n_valid_B[:, None]
        scores_B1S = index_scores(head_products(index), index.w_BTJ)
        selected = select_top_k(scores_B1S, visible[:, None], top_k)
        indices, n_read = selected_indices(selected[:, 0], top_k)
        row = torch.arange(len(q_BHK), device=q_BHK.device)[:, None]
        k_BSGK, v_BSGK = k_BSGK[row, indices], v_BSGK[row, indices]
    return decode_attention(q_BHK, k_BSGK.type_as(q_BHK), v_BSGK.type_as(q_BHK), n_read)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, index: Index, top_k: int | None, cu_seqlens: Tensor | None
) -> None:
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    assert 0 < T <= S, f"{T} queries cannot be the last of {S} tokens"
    assert k.shape == (B, S, G, K) and H % G == 0, f"k {tuple(k.shape)}, q {tuple(q.shape)}"
    assert v.shape == k.shape, f"v {tuple(v.shape)} must have the shape of k {tuple(k.shape)}"
    J, C = index.q_BTJC.shape[2:]
    shapes = [tuple(x.shape) for x in index]
    assert shapes == [(B, T, J, C), (B, S, C), (B, T, J)], f"index {shapes}, q {tuple(q.shape)}"
    assert index.w_BTJ.dtype.itemsize >= 4, f"index.w must be fp32, got {index.w_BTJ.dtype}"
    assert top_k is None or top_k >= 1, f"top_k {top_k} selects nothing"
    assert cu_seqlens is None or (B == 1 and S == T), "cu_seqlens packs whole documents into a row"
