"""DeepSeek sparse attention and the indexer's loss, in blocks of queries.

No tensor of all queries by all keys is made but a mask of one bit each: a block of queries meets
its keys, and what it leaves is its output, its part of the loss and its selection. Matrix products
take the inputs' dtype and sum in fp32; softmax, scores and loss are fp32 (fp64 for fp64 inputs).

Shapes as in `dsa`; R = H / G query heads share a key head; Q queries of a block.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from apps.LT2.kernel.documents import document_of_tokens, host_bounds
from apps.LT2.kernel.dsa.selection import (
    Index,
    head_products,
    index_scores,
    pack_bits,
    select_top_k,
    unpack_bits,
    wide_bmm,
    wide_dtype,
)

# Elements of the largest tensor of a block, (B, H, Q, S): 128 MiB in fp32, and some four of them
# are alive at a time. Smaller blocks skip more of the future but start more kernels.
BLOCK_ELEMENTS = 2**25
MIN_QUERIES = 16


@dataclass(frozen=True)
class Block:
    """Queries begin..end of T, and the keys first..last of S that they may see."""

    begin: int
    end: int
    first: int
    last: int
    visible: Tensor  # (Q, last - first) bool: causal, and in one document


@dataclass
class Forward:
    o_BTHK: Tensor
    bits_BTX: Tensor  # uint8, the selection of each query from its block's first key on; or empty
    loss: Tensor  # (): sum over queries of KL(p || softmax(I))
    index_grads: list[Tensor]  # of the loss by q_I, k_I and w; empty without a loss


def query_blocks(
    n_batch: int, n_heads: int, n_queries: int, n_keys: int, cu_seqlens: Tensor | None, device
) -> Iterator[Block]:
    size = BLOCK_ELEMENTS // (n_batch * n_heads * n_keys)
    size = max(MIN_QUERIES, size // MIN_QUERIES * MIN_QUERIES)
    offset = n_keys - n_queries
    position = torch.arange(n_keys, device=device)
    document, starts = None, [0]
    if cu_seqlens is not None:
        document, _ = document_of_tokens(cu_seqlens, n_keys)
        starts = host_bounds(cu_seqlens)
    for begin in range(0, n_queries, size):
        end = min(begin + size, n_queries)
        first = starts[bisect_right(starts, begin + offset) - 1]
        keys, queries = slice(first, end + offset), slice(begin + offset, end + offset)
        visible = position[queries, None] >= position[None, keys]
        if document is not None:
            visible &= document[queries, None] == document[None, keys]
        yield Block(begin, end, first, end + offset, visible)


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
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    q_NRTK, k_NSK, v_NSK = _grouped(q_BTHK, G), _by_head(k_BSGK), _by_head(v_BSGK)
    o_NRTK = torch.empty_like(q_NRTK)
    out = Forward(
        o_BTHK=q_BTHK.new_empty(0),
        bits_BTX=_empty_bits(q_BTHK, S, keep=keep_selection and top_k < S),
        loss=torch.zeros((), dtype=wide_dtype(q_BTHK.dtype), device=q_BTHK.device),
        index_grads=[torch.zeros_like(x, dtype=wide_dtype(x.dtype)) for x in index if with_loss],
    )
    for block in query_blocks(B, H, T, S, cu_seqlens, q_BTHK.device):
        queries, keys = slice(block.begin, block.end), slice(block.first, block.last)
        n_keys = block.last - block.first
        part = Index(index.q_BTJC[:, queries], index.k_BSC[:, keys], index.w_BTJ[:, queries])
        products, scores, selected = [], None, block.visible[None].expand(B, -1, -1)
        if with_loss or top_k < n_keys:
            products = head_products(part)
            scores = index_scores(products, part.w_BTJ)
        if top_k < n_keys:
            assert scores is not None
            selected = select_top_k(scores, block.visible, top_k)
        if out.bits_BTX.numel():
            bits = pack_bits(selected)
            out.bits_BTX[:, queries, : bits.shape[-1]] = bits

        bias_BQS = _bias(selected, out.loss.dtype)
        p_BHQS = _probabilities(q_NRTK[:, :, queries], k_NSK[:, keys], bias_BQS, B)
        o_NRTK[:, :, queries] = _combine(p_BHQS, v_NSK[:, keys]).unflatten(1, (H // G, -1))
        if with_loss:
            assert scores is not None
            target_BQS = p_BHQS.sum(1).div_(H)
            del p_BHQS
            log_guess_BQS = scores.add_(bias_BQS).log_softmax(-1)
            out.loss += _divergence(target_BQS, log_guess_BQS, selected)
            dscores_BQS = log_guess_BQS.exp_().sub_(target_BQS)
            dq, dk, dw = out.index_grads
            _index_backward(
                dscores_BQS, products, part, dq[:, queries], dk[:, keys], dw[:, queries]
            )
    out.o_BTHK = _by_token(o_NRTK, B)
    out.index_grads = [g.to(x.dtype) for g, x in zip(out.index_grads, index, strict=False)]
    return out


def backward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    bits_BTX: Tensor,
    cu_seqlens: Tensor | None,
    do_BTHK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; probabilities are computed again from the kept selection."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    wide, scale = wide_dtype(q_BTHK.dtype), K**-0.5
    q_NRTK, do_NRTK = _grouped(q_BTHK, G), _grouped(do_BTHK, G)
    k_NSK, v_NSK = _by_head(k_BSGK), _by_head(v_BSGK)
    dq_NRTK = torch.empty_like(q_NRTK)
    dk_NSK, dv_NSK = (torch.zeros_like(x, dtype=wide) for x in (k_NSK, v_NSK))
    for block in query_blocks(B, H, T, S, cu_seqlens, q_BTHK.device):
        queries, keys = slice(block.begin, block.end), slice(block.first, block.last)
        selected = block.visible[None]
        if bits_BTX.numel():
            n_keys = block.last - block.first
            selected = unpack_bits(bits_BTX[:, queries, : -(-n_keys // 8)], n_keys)
        q_NMK, do_NMK = (x[:, :, queries].flatten(1, 2) for x in (q_NRTK, do_NRTK))  # M = R Q
        bias_BQS = _bias(selected, wide)
        p_BHQS = _probabilities(q_NRTK[:, :, queries], k_NSK[:, keys], bias_BQS, B)
        p_NMS = p_BHQS.view(*q_NMK.shape[:2], -1)
        dv_NSK[:, keys] += wide_bmm(p_NMS.to(q_NMK.dtype).transpose(1, 2), do_NMK)
        dp_NMS = wide_bmm(do_NMK, v_NSK[:, keys].transpose(1, 2))
        ds_NMS = torch.ops.aten._softmax_backward_data(dp_NMS, p_NMS, -1, wide)
        del dp_NMS, p_NMS, p_BHQS
        ds_NMS = ds_NMS.mul_(scale).to(q_NMK.dtype)
        dk_NSK[:, keys] += wide_bmm(ds_NMS.transpose(1, 2), q_NMK)
        dq_NMK = wide_bmm(ds_NMS, k_NSK[:, keys])
        dq_NRTK[:, :, queries] = dq_NMK.view_as(dq_NRTK[:, :, queries])
    dk, dv = (x.unflatten(0, (B, G)).transpose(1, 2).to(q_BTHK.dtype) for x in (dk_NSK, dv_NSK))
    return _by_token(dq_NRTK, B), dk.contiguous(), dv.contiguous()


def _by_head(x_BSGK: Tensor) -> Tensor:
    """(N, S, K) with N = B G matrices, for batched products."""
    return x_BSGK.transpose(1, 2).flatten(0, 1).contiguous()


def _grouped(q_BTHK: Tensor, n_kv_heads: int) -> Tensor:
    """(N, R, T, K): the queries of each key head together."""
    return q_BTHK.unflatten(2, (n_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _by_token(o_NRTK: Tensor, n_batch: int) -> Tensor:
    """(B, T, H, K), undoing `_grouped`."""
    o_BTGRK = o_NRTK.unflatten(0, (n_batch, -1)).permute(0, 3, 1, 2, 4)
    return o_BTGRK.flatten(2, 3).contiguous()


def _empty_bits(q_BTHK: Tensor, n_keys: int, *, keep: bool) -> Tensor:
    if not keep:
        return q_BTHK.new_empty(0, dtype=torch.uint8)
    return q_BTHK.new_zeros(*q_BTHK.shape[:2], -(-n_keys // 8), dtype=torch.uint8)


def _bias(selected_BQS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is selected and -inf elsewhere."""
    zeros = torch.zeros(selected_BQS.shape, dtype=dtype, device=selected_BQS.device)
    return zeros.masked_fill_(~selected_BQS, float("-inf"))


def _probabilities(q_NRQK: Tensor, k_NSK: Tensor, bias_BQS: Tensor, n_batch: int) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias), (B, H, Q, S)."""
    n_queries, head_dim = q_NRQK.shape[2:]
    logits_NMS = wide_bmm(q_NRQK.flatten(1, 2), k_NSK.transpose(1, 2))
    logits_BHQS = logits_NMS.view(n_batch, -1, n_queries, k_NSK.shape[1])
    torch.add(bias_BQS[:, None], logits_BHQS, alpha=head_dim**-0.5, out=logits_BHQS)
    return logits_BHQS.softmax(-1)


def _combine(p_BHQS: Tensor, v_NSK: Tensor) -> Tensor:
    """p v, (N, R Q, K)."""
    p_NMS = p_BHQS.view(v_NSK.shape[0], -1, v_NSK.shape[1])
    return wide_bmm(p_NMS.to(v_NSK.dtype), v_NSK)


def _divergence(target_BQS: Tensor, log_guess_BQS: Tensor, selected_BQS: Tensor) -> Tensor:
    """sum of KL(target || guess). Where no key is selected the guess's logarithm is -inf, and the
    target 0: such a pair adds nothing."""
    log_guess_BQS = log_guess_BQS.masked_fill(~selected_BQS, 0)
    return torch.xlogy(target_BQS, target_BQS).sub_(log_guess_BQS.mul_(target_BQS)).sum()


def _index_backward(
    dscores_BQS: Tensor,
    products: list[Tensor],
    part: Index,
    dq_BQJC: Tensor,
    dk_BSC: Tensor,
    dw_BQJ: Tensor,
) -> None:
    """Write the gradients of q and w of a block's queries, and add to that of the keys."""
    dtype = part.q_BTJC.dtype
    for j, heard_BQS in enumerate(products):
        dw_BQJ[..., j] = (dscores_BQS * heard_BQS).sum(-1)
        dheard_BQS = (dscores_BQS * part.w_BTJ[..., j, None]).mul_(heard_BQS > 0).to(dtype)
        dq_BQJC[:, :, j] = wide_bmm(dheard_BQS, part.k_BSC)
        dk_BSC += wide_bmm(dheard_BQS.transpose(1, 2), part.q_BTJC[:, :, j])
