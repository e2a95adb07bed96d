"""ModelCache: what a looped model keeps while it decodes.

There is one mixer cache for every (loop, layer): a layer that runs T times per token has T pasts.
Buffers are allocated once and written in place, so a CUDA graph can capture a decode step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from apps.LT2.kernel.documents import host_cu_seqlens, upload
from apps.LT2.mixers.base import Extension, MixerCache
from lingua.errors import UserError


@dataclass
class ModelCache:
    """`lengths` counts the tokens of each row on the host; the device has its own counters."""

    mixers: list[list[MixerCache]]  # [loop][layer]
    max_seqlen: int
    lengths: list[int]

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empty the given rows, or all if None, so that a prefill starts new sequences there."""
        for row in range(self.batch_size) if rows is None else rows:
            self.lengths[row] = 0
        index = None if rows is None else self._index(rows)
        for cache in self._caches():
            cache.reset(index)

    def copy_rows(
        self, rows: Sequence[int], source: ModelCache, source_rows: Sequence[int]
    ) -> None:
        """Copy the sequences in `source_rows` to `rows`, in place.

        `source` is this cache, or one of the same model and max_seqlen.
        """
        assert source.max_seqlen == self.max_seqlen, "rows of another length"
        for row, source_row in zip(rows, source_rows, strict=True):
            self.lengths[row] = source.lengths[source_row]
        index, source_index = self._index(rows), self._index(source_rows)
        for cache, other in zip(self._caches(), source._caches(), strict=True):
            cache.copy_rows(index, other, source_index)

    def fill_randomly(self, n_tokens: int) -> None:
        """Fill every row with `n_tokens` tokens of noise, in place, to time steps."""
        assert n_tokens <= self.max_seqlen, f"{n_tokens} tokens in {self.max_seqlen} slots"
        self.lengths[:] = [n_tokens] * self.batch_size
        for cache in self._caches():
            cache.fill_randomly(n_tokens)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore the cache at the end of the context, in place.

        A cache that holds tokens is copied, which doubles its memory. An empty one is emptied.
        """
        lengths = list(self.lengths)
        saved = [cache.snapshot() for cache in self._caches()] if any(lengths) else None
        try:
            yield
        finally:
            if saved is None:
                self.reset()
            else:
                self.lengths[:] = lengths
                for cache, tensors in zip(self._caches(), saved, strict=True):
                    cache.restore(tensors)

    def extend(self, rows: Sequence[int], n_tokens: Sequence[int]) -> tuple[Extension, ...]:
        """Count `n_tokens` new tokens in `rows`; UserError, and no change, if they don't fit.

        Returns the extensions for the mixers, () if all rows were empty.
        """
        for row, n in zip(rows, n_tokens, strict=True):
            if self.lengths[row] + n > self.max_seqlen:
                raise UserError(
                    f"{self.lengths[row]} cached + {n} new tokens exceed the cache's "
                    f"max_seqlen={self.max_seqlen}; allocate a longer one or shorten the prompt"
                )
        past = [Extension(row, self.lengths[row], n) for row, n in zip(rows, n_tokens, strict=True)]
        for row, _, n in past:
            self.lengths[row] += n
        return tuple(past) if any(extension.held for extension in past) else ()

    def _caches(self) -> list[MixerCache]:
        return [cache for loop in self.mixers for cache in loop]

    def _index(self, rows: Sequence[int]) -> Tensor:
        caches = self._caches()
        return upload(rows, caches[0].device if caches else "cpu", torch.int64)


def packed_lengths(tokens_BT: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Return the number of tokens of each sequence of a prefill, on the host."""
    if cu_seqlens is None:
        return [tokens_BT.shape[1]] * tokens_BT.shape[0]
    return [end - start for start, end in itertools.pairwise(host_cu_seqlens(cu_seqlens))]
