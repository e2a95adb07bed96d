"""The keys that a query attends to: the lightning indexer's scores and their k largest.

    I(t, s) = sum_j w(t, j) ReLU(q_I(t, j) . k_I(s))

Shapes: B batch, T queries, S keys, J index heads, C index dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Index(NamedTuple):
    """The indexer's projections of T queries and S keys."""

    q_BTJC: Tensor
    k_BSC: Tensor  # one head, shared by the index heads
    w_BTJ: Tensor  # fp32, any sign


def wide_bmm(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b for batches of matrices; 16-bit inputs are summed and returned in fp32."""
    if a.dtype.itemsize >= 4:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
    return torch.bmm(a.float(), b.float())


def index_scores(products: Sequence[Tensor], w_BTJ: Tensor) -> Tensor:
    """Return I (B, T, S) from the `head_products` of every head."""
    scores = torch.zeros_like(products[0])
    for j, heard_BTS in enumerate(products):
        scores.addcmul_(heard_BTS, w_BTJ[..., j, None])
    return scores


def head_products(index: Index) -> list[Tensor]:
    """Return ReLU(q_I(t, j) . k_I(s)), (B, T, S) in fp32, for each index head j."""
    k_BCS = index.k_BSC.transpose(1, 2)
    return [wide_bmm(q_BTC, k_BCS).relu_() for q_BTC in index.q_BTJC.unbind(2)]


def select_top_k(scores_BTS: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """Select the visible keys with the top_k largest scores, (B, T, S) bool; later keys win ties.

    visible (T, S) or (B, T, S) bool. ReLU makes many scores exactly 0, and torch.topk's choice
    among equals depends on shape and device.
    """
    if top_k >= scores_BTS.shape[-1]:
        return visible.expand_as(scores_BTS)
    scores = scores_BTS.masked_fill(~visible, float("-inf"))
    last = scores.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tied = scores > last, (scores == last) & visible
    room = top_k - above.sum(-1, keepdim=True)
    # The rank of each tied key from the end.
    place = tied.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return above | (tied & (place <= room))


def selected_indices(selected_BS: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the selected keys' indices in order, (B, top_k) int64, and their counts (B,).

    No row selects more than top_k; unused entries are 0. No shape depends on the selection, so a
    CUDA graph can capture this.
    """
    n_rows, n_keys = selected_BS.shape
    place = selected_BS.cumsum(-1)
    count = place[:, -1]
    column = torch.where(selected_BS, place - 1, top_k)  # others go to a dropped column
    indices = torch.zeros(n_rows, top_k + 1, dtype=torch.int64, device=selected_BS.device)
    keys = torch.arange(n_keys, device=selected_BS.device).expand(n_rows, n_keys)
    return indices.scatter_(1, column, keys)[:, :top_k], count


def pack_bits(mask: Tensor) -> Tensor:
    """Pack (..., S) bool into (..., ceil(S / 8)) uint8."""
    short = -mask.shape[-1] % 8
    bits = torch.nn.functional.pad(mask, (0, short)).unflatten(-1, (-1, 8)).to(torch.uint8)
    powers = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << powers).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, size: int) -> Tensor:
    """Undo `pack_bits`: (..., size) bool."""
    powers = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> powers) & 1).flatten(-2)[..., :size].bool()


def mask_bytes(n_keys: int) -> int:
    """Return the bytes of a row of the kernels' mask, in whole words for tiles of 32 or 64 keys."""
    return -(-n_keys // 64) * 8


def as_words(bits_BTX: Tensor) -> Tensor:
    """View the packed mask as int32: bit i is key i of 32, since bytes are little-endian."""
    return bits_BTX.view(torch.int32)
