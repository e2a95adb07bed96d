"""DeepSeek sparse attention and the indexer's loss, in blocks of queries.

The only tensor of all queries by all keys is a mask of one bit each. Scores and loss are fp32 (fp64
for fp64 inputs).

Shapes as in `dsa`; Q queries in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apps.LT2.kernel.arguments import wide_dtype
from apps.LT2.kernel.dsa.blocks import query_blocks, query_ranges
from apps.LT2.kernel.dsa.plain import PlainAttention
from apps.LT2.kernel.dsa.selection import (
    Index,
    head_products,
    index_scores,
    mask_bytes,
    pack_bits,
    select_top_k,
    wide_bmm,
)
from apps.LT2.kernel.dsa.triton import Documents, KernelAttention
from apps.LT2.kernel.dsa.triton_index import KernelIndexer


@dataclass
class Forward:
    o_BTHK: Tensor
    lse_BHT: Tensor  # log2 of the kernels' sums of exponentials; empty without kernels
    bits_BTX: Tensor  # uint8, one bit per query and key: whether it is selected; or empty
    loss: Tensor  # (): sum over queries of KL(p || softmax(I))
    index_grads: list[Tensor]  # gradients of the loss for q_I, k_I and w; [] without loss


def forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    index: Index,
    cu_seqlens: Tensor | None,
    top_k: int,
    *,
    with_loss: bool,
    keep_selection: bool,
) -> Forward:
    """Compute in plain torch."""
    (B, T, H, _), S, J = q_BTHK.shape, k_BSGK.shape[1], index.q_BTJC.shape[2]
    wide, device = wide_dtype(q_BTHK.dtype), q_BTHK.device
    keep = keep_selection and top_k < S
    bits_BTX = torch.zeros((B, T, -(-S // 8)) if keep else 0, dtype=torch.uint8, device=device)
    attention = PlainAttention(q_BTHK, k_BSGK, v_BSGK)
    loss = torch.zeros((), dtype=wide, device=device)
    grads = [torch.zeros_like(x, dtype=wide) for x in index if with_loss]

    widest = B * max(H, J)
    for block in query_blocks(T, S, cu_seqlens, elements_per_pair=widest, device=device):
        queries, keys = block.queries, block.keys
        part = Index(index.q_BTJC[:, queries], index.k_BSC[:, keys], index.w_BTJ[:, queries])
        choosing = top_k < block.n_keys
        products = head_products(part) if with_loss or choosing else []
        scores_BQS = index_scores(products, part.w_BTJ) if products else None
        selected_BQS = block.visible[None].expand(B, -1, -1)
        if scores_BQS is not None and choosing:
            selected_BQS = select_top_k(scores_BQS, block.visible, top_k)
        if keep:
            bits = pack_bits(selected_BQS)
            at = block.first // 8
            bits_BTX[:, queries, at : at + bits.shape[-1]] = bits
        mean_BQS = attention.attend(block, selected_BQS, with_mean=with_loss)
        if scores_BQS is not None and mean_BQS is not None:
            loss_of_block, dscores_BQS = _divergence(mean_BQS, scores_BQS, selected_BQS)
            loss += loss_of_block
            dq, dk, dw = grads
            _index_backward(
                dscores_BQS, products, part, dq[:, queries], dk[:, keys], dw[:, queries]
            )

    o_BTHK, lse_BHT = attention.results()
    grads = [grad.to(x.dtype) for grad, x in zip(grads, index, strict=False)]
    return Forward(o_BTHK, lse_BHT, bits_BTX, loss, grads)


def forward_on_kernels(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    index: Index,
    cu_seqlens: Tensor | None,
    top_k: int,
    *,
    with_loss: bool,
) -> Forward:
    """Compute on Triton kernels; S is T. The loss's gradient overwrites a block's scores."""
    B, T = q_BTHK.shape[:2]
    bits_BTX = q_BTHK.new_zeros(B, T, mask_bytes(T), dtype=torch.uint8)
    documents = Documents.of(cu_seqlens, T, q_BTHK.device)
    attention = KernelAttention(q_BTHK, k_BTGK, v_BTGK, bits_BTX, documents)
    indexer = KernelIndexer(index, attention, top_k, with_loss=with_loss)
    for begin, end in query_ranges(T, elements_per_query=B * T):
        scores_BQS, log_sum_BQ = indexer.choose(begin, end)
        attention.attend(begin, end)
        if with_loss:
            indexer.compare(scores_BQS, log_sum_BQ, begin, end)
            indexer.differentiate(scores_BQS, begin, end)
    loss, grads = indexer.results()
    return Forward(attention.o_BTHK, attention.lse_BHT, bits_BTX, loss, grads)


def _divergence(
    target_BQS: Tensor, scores_BQS: Tensor, selected_BQS: Tensor
) -> tuple[Tensor, Tensor]:
    """Return sum of KL(target || softmax(scores)) over the selected keys, and the scores' gradient.

    The target is 0 for unselected keys. Overwrites scores.
    """
    log_guess_BQS = scores_BQS.masked_fill_(~selected_BQS, float("-inf")).log_softmax(-1)
    dscores_BQS = log_guess_BQS.exp().sub_(target_BQS)
    # An unselected key adds 0, not 0 * inf.
    cross_BQS = log_guess_BQS.masked_fill_(~selected_BQS, 0).mul_(target_BQS)
    return torch.xlogy(target_BQS, target_BQS).sub_(cross_BQS).sum(), dscores_BQS


def _index_backward(
    dscores_BQS: Tensor,
    products: list[Tensor],
    part: Index,
    dq_BQJC: Tensor,
    dk_BSC: Tensor,
    dw_BQJ: Tensor,
) -> None:
    """Write the gradients of q and w of a block's queries; add to the gradient of the keys."""
    dtype = part.q_BTJC.dtype
    for j, heard_BQS in enumerate(products):
        dw_BQJ[..., j] = (dscores_BQS * heard_BQS).sum(-1)
        dheard_BQS = (dscores_BQS * part.w_BTJ[..., j, None]).mul_(heard_BQS > 0).to(dtype)
        dq_BQJC[:, :, j] = wide_bmm(dheard_BQS, part.k_BSC)
        dk_BSC += wide_bmm(dheard_BQS.transpose(1, 2), part.q_BTJC[:, :, j])
