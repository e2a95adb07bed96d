"""Blocks of tokens: their positions, their mean keys, and the choice of each query.

A sequence (a row, or a document of a packed row) is cut into blocks of `size` tokens from its first
token on; the last one may be incomplete. Blocks of packed documents are numbered through the row. A
choice of blocks counts from the document's first block, as in fla. No shape depends on the values
of cu_seqlens, so a compiled graph does not break.

Shapes: B rows, S tokens (keys), T queries, G key/value heads, K head dim, C blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.arguments import wide_dtype
from apps.LT2.kernel.documents import document_of_tokens


@dataclass(frozen=True)
class Blocks:
    """The blocks of a row of S tokens; with documents C = S // size + n_docs, an upper bound."""

    size: int
    of_token_S: Tensor  # block of each token
    first_S: Tensor  # first block of the token's document
    start_C: Tensor  # first token of each block
    length_C: Tensor  # its tokens; 0 for unused numbers


def cut_blocks(
    n_tokens: int, size: int, cu_seqlens: Tensor | None, device: torch.device | str
) -> Blocks:
    """Cut a row into blocks: cu_seqlens [0, 5, 8] and size 2 -> 0 0 1 1 2 | 3 3 4."""
    if cu_seqlens is None:
        token = torch.arange(n_tokens, device=device)
        start_C = torch.arange(0, n_tokens, size, device=device)
        length_C = (n_tokens - start_C).clamp(max=size)
        return Blocks(size, token // size, torch.zeros_like(token), start_C, length_C)
    offsets = cu_seqlens.long()
    n_documents = len(offsets) - 1
    first_block = F.pad(((offsets.diff() + size - 1) // size).cumsum(0), (1, 0))
    document, position = document_of_tokens(cu_seqlens, n_tokens)
    block = torch.arange(n_tokens // size + n_documents, device=offsets.device)
    owner = torch.searchsorted(first_block, block, right=True) - 1
    owner = owner.clamp(max=n_documents - 1)
    start_C = offsets[owner] + (block - first_block[owner]) * size
    length_C = (offsets[owner + 1] - start_C).clamp(0, size)
    return Blocks(
        size, first_block[document] + position // size, first_block[document], start_C, length_C
    )


def mean_of_blocks(x_BSGK: Tensor, blocks: Blocks, *, packed: bool) -> Tensor:
    """Return the mean of each block, (B, C, G, K), summed in fp32; undefined if incomplete."""
    size, n_tokens = blocks.size, x_BSGK.shape[1]
    if packed:
        token_Cs = blocks.start_C[:, None] + torch.arange(size, device=x_BSGK.device)
        members = x_BSGK[:, token_Cs.clamp(max=n_tokens - 1)]
        # Filled, not multiplied: the gradients of unused blocks may be NaN.
        outside = blocks.length_C < size
        members = members.masked_fill(outside[:, None, None, None], 0)
    else:
        members = F.pad(x_BSGK, (0, 0, 0, 0, 0, -n_tokens % size)).unflatten(1, (-1, size))
    return wide(members).mean(2).to(x_BSGK.dtype)


def seen_complete(blocks: Blocks, token_T: Tensor) -> Tensor:
    """Return (T, C) bool: whether a block of the query's document is complete at the query."""
    first_T, own_T = blocks.first_S[token_T], blocks.of_token_S[token_T]
    block_C = torch.arange(len(blocks.start_C), device=token_T.device)
    ends = (block_C == own_T[:, None]) & (blocks.start_C + blocks.size - 1 == token_T[:, None])
    return (block_C >= first_T[:, None]) & ((block_C < own_T[:, None]) | ends)


def choose_blocks(importance: Tensor, first: Tensor, own: Tensor, n_blocks: int) -> Tensor:
    """Choose the first block, the query's own, the one before it, and the most important others.

    importance  (..., C)   not negative, by block number; of equal ones the lower number wins
    first, own             block numbers that broadcast against (..., 1)
    Returns (..., min(n_blocks, C)) int64, counted from `first`; -1 if there are fewer blocks.
    """
    block_C = torch.arange(importance.shape[-1], device=importance.device)
    forced = (block_C == first) | (block_C == own) | (block_C == own - 1)
    score = importance.masked_fill(forced, torch.inf)
    score = score.masked_fill((block_C < first) | (block_C > own), -1.0)
    # A stable sort: the choice of topk among equals depends on the shape.
    chosen = score.sort(dim=-1, descending=True, stable=True).indices[..., :n_blocks]
    return torch.where((chosen >= first) & (chosen <= own), chosen - first, -1)


def wide(x: Tensor) -> Tensor:
    """Cast to the dtype of scores, softmax and means."""
    return x.to(wide_dtype(x.dtype))
