"""Blocks of queries, and the keys that each can see.

Shapes: B batch, T queries, S >= T keys (the queries are the last T of S tokens), Q queries of a
block.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from apps.LT2.kernel.documents import document_of_tokens, host_cu_seqlens

# Elements of the largest tensor of a block: 128 MiB in fp32, and about four are alive at a time.
# Smaller blocks skip more of the future but launch more kernels.
BLOCK_ELEMENTS = 2**25
MIN_QUERIES = 16


@dataclass(frozen=True)
class Block:
    """Queries begin..end of T, and the keys first..last of S that they can see."""

    begin: int
    end: int
    first: int  # a multiple of 8, so that a block's selection fills whole bytes of the mask
    last: int
    visible: Tensor  # (Q, last - first) bool: causal, and in one document

    @property
    def queries(self) -> slice:
        return slice(self.begin, self.end)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.last)

    @property
    def n_keys(self) -> int:
        return self.last - self.first


def query_ranges(n_queries: int, *, elements_per_query: int) -> Iterator[tuple[int, int]]:
    """Yield begin, end of each block. elements_per_query: of the largest tensor of a block."""
    size = BLOCK_ELEMENTS // elements_per_query
    size = max(MIN_QUERIES, size // MIN_QUERIES * MIN_QUERIES)
    for begin in range(0, n_queries, size):
        yield begin, min(begin + size, n_queries)


def query_blocks(
    n_queries: int,
    n_keys: int,
    cu_seqlens: Tensor | None,
    *,
    elements_per_pair: int,
    device: torch.device,
) -> Iterator[Block]:
    """Yield the blocks. elements_per_pair: of the largest tensor, per query and key of a block."""
    offset = n_keys - n_queries
    position = torch.arange(n_keys, device=device)
    document, starts = None, [0]
    if cu_seqlens is not None:
        document, _ = document_of_tokens(cu_seqlens, n_keys)
        starts = host_cu_seqlens(cu_seqlens)
    for begin, end in query_ranges(n_queries, elements_per_query=elements_per_pair * n_keys):
        first = starts[bisect_right(starts, begin + offset) - 1] // 8 * 8
        keys, queries = slice(first, end + offset), slice(begin + offset, end + offset)
        visible = position[queries, None] >= position[None, keys]
        if document is not None:
            visible &= document[queries, None] == document[None, keys]
        yield Block(begin, end, first, end + offset, visible)
