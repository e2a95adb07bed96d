"""Blocks of tokens: where they lie, their mean keys, and which of them a query attends to.

A sequence (a row, or a document of a packed one) is cut into blocks of `size` tokens from its first
token on; the last one may be incomplete. Blocks of packed documents are numbered through the row,
but a choice of blocks counts from the document's first one, as in fla. No shape here depends on
the values of cu_seqlens, so a compiled graph does not break.

Shapes: B rows, S tokens (keys), T queries, G key/value heads, K head width, C blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.documents import document_of_tokens


@dataclass(frozen=True)
class Blocks:
    """The blocks of a row of S tokens; with documents C is an upper bound, S // size + n_docs."""

    size: int
    of_token_S: Tensor  # block of each token
    first_S: Tensor  # first block of the token's document
    start_C: Tensor  # first token of each block
    length_C: Tensor  # its tokens; 0 for numbers that no block has


def cut_blocks(
    n_tokens: int, size: int, cu_seqlens: Tensor | None, device: torch.device | str
) -> Blocks:
    """[0, 5, 8] with size 2 -> blocks 0 0 1 1 2 | 3 3 4."""
    if cu_seqlens is None:
        token = torch.arange(n_tokens, device=device)
        start_C = torch.arange(0, n_tokens, size, device=device)
        length_C = (n_tokens - start_C).clamp(max=size)
        return Blocks(size, token // size, torch.zeros_like(token), start_C, length_C)
    bounds = cu_seqlens.long()
    n_documents = len(bounds) - 1
    first_block = F.pad(((bounds.diff() + size - 1) // size).cumsum(0), (1, 0))
    document, position = document_of_tokens(cu_seqlens, n_tokens)
    block = torch.arange(n_tokens // size + n_documents, device=bounds.device)
    owner = torch.searchsorted(first_block, block, right=True) - 1
    owner = owner.clamp(max=n_documents - 1)
    start_C = bounds[owner] + (block - first_block[owner]) * size
    length_C = (bounds[owner + 1] - start_C).clamp(0, size)
    return Blocks(
        size, first_block[document] + position // size, first_block[document], start_C, length_C
    )


def mean_of_blocks(x_BSGK: Tensor, blocks: Blocks, *, packed: bool) -> Tensor:
    """(B, C, G, K), the mean of each complete block, summed in fp32; others hold no meaning."""
    size, n_tokens = blocks.size, x_BSGK.shape[1]
    if packed:
        token_Cs = blocks.start_C[:, None] + torch.arange(size, device=x_BSGK.device)
        members = x_BSGK[:, token_Cs.clamp(max=n_tokens - 1)]
        # Filled, and not multiplied: what a kernel leaves in a gradient of no block may be NaN.
        outside = blocks.length_C < size
        members = members.masked_fill(outside[:, None, None, None], 0)
    else:
        members = F.pad(x_BSGK, (0, 0, 0, 0, 0, -n_tokens % size)).unflatten(1, (-1, size))
    return wide(members).mean(2).to(x_BSGK.dtype)


def seen_complete(blocks: Blocks, token_T: Tensor) -> Tensor:
    """(T, C) bool: whether a block of the query's own document is complete at the query."""
    first_T, own_T = blocks.first_S[token_T], blocks.of_token_S[token_T]
    block_C = torch.arange(len(blocks.start_C), device=token_T.device)
    ends = (block_C == own_T[:, None]) & (blocks.start_C + blocks.size - 1 == token_T[:, None])
    return (block_C >= first_T[:, None]) & ((block_C < own_T[:, None]) | ends)


def choose_blocks(importance: Tensor, first: Tensor, own: Tensor, n_blocks: int) -> Tensor:
    """The blocks that queries attend to: the first one, the query's own and the one before it, and
    the most important of the complete ones between; the lower of equals.

    importance  (..., C)   not negative, by block number
    first, own             block numbers, shaped to broadcast against (..., 1)
    Returns (..., min(n_blocks, C)) int64, counted from `first`, -1 where there are fewer blocks.
    """
    block_C = torch.arange(importance.shape[-1], device=importance.device)
    forced = (block_C == first) | (block_C == own) | (block_C == own - 1)
    score = importance.masked_fill(forced, torch.inf)
    score = score.masked_fill((block_C < first) | (block_C > own), -1.0)
    # A stable sort and not topk, whose choice among equals differs from shape to shape.
    chosen = score.sort(dim=-1, descending=True, stable=True).indices[..., :n_blocks]
    return torch.where((chosen >= first) & (chosen <= own), chosen - first, -1)


def wide(x: Tensor) -> Tensor:
    """x in fp32 at least: scores, their softmax and means are computed there."""
    return x if x.dtype == torch.float64 else x.float()
