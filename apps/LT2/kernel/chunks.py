"""Split sequences into chunks, for the chunked forms of the recurrences in plain torch.

Shapes: M chunks of all sequences, H heads, C tokens in a chunk, D any size, K key and V value head
dim, N sequences.

Chunks are numbered by step: the first chunk of every sequence, longest sequence first, then the
second chunk of every sequence that has one, and so on. One step of a state recurrence serves all
sequences and reads a contiguous slice. A long document among short ones costs no padding.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.documents import document_of_tokens, host_cu_seqlens, upload
from apps.LT2.kernel.scores import DecayedScores

Results = tuple[Tensor, Tensor]  # o, states

CHUNK = 64  # as in fla's kernels: work inside a chunk grows with C, steps between chunks with 1/C
# With a decay per channel scores cost C x K exponentials a token, states K x V / C.
CHANNEL_CHUNK = 16


def eager_on_documents(chunked: Callable[..., Results]) -> Callable[..., Results]:
    """Hide a chunked form from torch.compile when documents are packed.

    Its Python depends on the documents' lengths, so each batch would be compiled again.
    """
    eager: Any = torch.compiler.disable(chunked)

    @wraps(chunked)
    def either(*inputs: Tensor, cu_seqlens: Tensor | None = None, **options: Any) -> Results:
        form = chunked if cu_seqlens is None else eager
        return form(*inputs, cu_seqlens=cu_seqlens, **options)

    return either


@dataclass
class ChunkLayout:
    """The slot of each token in its chunk.

    Unused slots hold zeros. A token of zeros does not decay, write or read.
    """

    chunk: int  # tokens in a chunk
    n_running: list[int]  # sequences that have a chunk at step 0, 1, ..
    # slot of each packed token; None: dense rows, whose slots follow from the shape
    slot_T: Tensor | None = None
    order_N: Tensor | None = None  # packed: sequences, longest first

    @staticmethod
    def of(B: int, T: int, cu_seqlens: Tensor | None, chunk: int = CHUNK) -> ChunkLayout:
        """Lay out B rows of T tokens, or the documents that cu_seqlens packs into one row of T."""
        if cu_seqlens is None:
            chunk = min(chunk, T)
            return ChunkLayout(chunk, [B] * -(-T // chunk))
        return _packed_layout(cu_seqlens, chunk)

    @property
    def n_sequences(self) -> int:
        return self.n_running[0] if self.order_N is None else len(self.order_N)

    def to_chunks(self, x_BTHD: Tensor) -> Tensor:
        """Return (M, H, C, D)."""
        B, T, H, D = x_BTHD.shape
        if self.slot_T is None:
            steps = len(self.n_running)
            x = F.pad(x_BTHD, (0, 0, 0, 0, 0, steps * self.chunk - T))
            return x.view(B, steps, self.chunk, H, D).permute(1, 0, 3, 2, 4).flatten(0, 1)
        slots = x_BTHD.new_zeros(sum(self.n_running) * self.chunk, H, D)
        x = slots.index_copy(0, self.slot_T, x_BTHD[0])
        return x.view(-1, self.chunk, H, D).transpose(1, 2)

    def from_chunks(self, o_MHCV: Tensor, B: int, T: int) -> Tensor:
        """Return (B, T, H, V)."""
        _, H, C, V = o_MHCV.shape
        if self.slot_T is None:
            o = o_MHCV.view(len(self.n_running), B, H, C, V).permute(1, 0, 3, 2, 4)
            return o.reshape(B, -1, H, V)[:, :T]
        return o_MHCV.transpose(1, 2).reshape(-1, H, V)[self.slot_T][None]

    def sort_sequences(self, state_NHKV: Tensor) -> Tensor:
        return state_NHKV if self.order_N is None else state_NHKV[self.order_N]

    def unsort_sequences(self, state_NHKV: Tensor) -> Tensor:
        return state_NHKV if self.order_N is None else state_NHKV[self.order_N.argsort()]


def _packed_layout(cu_seqlens: Tensor, chunk: int) -> ChunkLayout:
    offsets, device = host_cu_seqlens(cu_seqlens), cu_seqlens.device
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    chunk = min(chunk, max(lengths))
    n_chunks = [-(-length // chunk) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda n: -n_chunks[n])
    rising = sorted(n_chunks)
    n_running = [len(rising) - bisect_right(rising, step) for step in range(rising[-1])]

    rank = [0] * len(order)
    for place, sequence in enumerate(order):
        rank[sequence] = place
    first_chunk_of_step = list(itertools.accumulate(n_running, initial=0))
    rank_N, first_of_step = (upload(x, device, torch.int64) for x in (rank, first_chunk_of_step))
    sequence_T, position_T = document_of_tokens(cu_seqlens, offsets[-1])
    chunk_T = first_of_step[position_T // chunk] + rank_N[sequence_T]
    slot_T = chunk_T * chunk + position_T % chunk
    return ChunkLayout(chunk, n_running, slot_T, upload(order, device, torch.int64))


def pass_state(
    layout: ChunkLayout,
    *,
    keep: Tensor,
    write: Tensor,
    state: Tensor | None,
    erase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run S <- keep * S - erase S + write over the chunks of each sequence.

    keep   broadcasts to (M, H, K, V)      write  (M, H, K, V)      erase  (M, H, K, K)
    state  (N, H, K, V) before the first token, zeros if None
    Returns S at each chunk's start, (M, H, K, V), and S after each sequence, (N, H, K, V).
    """
    if state is None:
        S = write.new_zeros(layout.n_sequences, *write.shape[1:])
    else:
        S = layout.sort_sequences(state.to(write.dtype))
    # Split, not sliced: backward of a slice writes zeros for all other chunks.
    steps = layout.n_running
    keeps, writes = keep.split(steps), write.split(steps)
    erases = [None] * len(steps) if erase is None else erase.split(steps)
    starts, ended = [], []
    for n_running, kept, written, erased in zip(steps, keeps, writes, erases, strict=True):
        ended.append(S[n_running:])  # sequences without another chunk are the last rows
        S = S[:n_running]
        starts.append(S)
        after = kept * S + written
        S = after if erased is None else after - erased @ S
    return torch.cat(starts), layout.unsort_sequences(torch.cat([S, *reversed(ended)]))


@dataclass
class HeadDecay:
    """The decay of spans of a chunk, from one log decay g <= 0 per head and token."""

    between_MHCC: Tensor  # after token j, up to and with token i; 0 for j > i
    from_start: Tensor  # (M, H, C, 1): from the chunk's start, up to and with token i
    to_end: Tensor  # (M, H, C, 1): after token j, up to the chunk's end
    whole: Tensor  # (M, H, 1, 1): over the whole chunk

    @staticmethod
    def of(g_MHC: Tensor, dtype: torch.dtype) -> HeadDecay:
        # Sum in fp64: after strong decay the sums are large and their differences small.
        sum_MHC = g_MHC.double().cumsum(-1)
        C = g_MHC.shape[-1]
        later = torch.ones(C, C, dtype=torch.bool, device=g_MHC.device).triu(1)
        # Mask before exp: above the diagonal exp could overflow, and inf * 0 is a NaN gradient.
        between = (sum_MHC[..., :, None] - sum_MHC[..., None, :]).to(dtype)
        return HeadDecay(
            between_MHCC=between.masked_fill(later, -torch.inf).exp(),
            from_start=sum_MHC.to(dtype).exp()[..., None],
            to_end=(sum_MHC[..., -1:] - sum_MHC).to(dtype).exp()[..., None],
            whole=sum_MHC[..., -1].to(dtype).exp()[..., None, None],
        )

    def scores(self, k_MHCK: Tensor, *readers_MHCK: Tensor) -> tuple[Tensor, ...]:
        """Return x_i . k_j times the decay between j and i, 0 for j > i, for each reader x."""
        return tuple((x_MHCK @ k_MHCK.mT) * self.between_MHCC for x_MHCK in readers_MHCK)


@dataclass
class ChannelDecay:
    """The same from one log decay per key channel. Use chunks of CHANNEL_CHUNK tokens."""

    sum_MHCK: Tensor  # log of from_start, in fp64
    from_start: Tensor  # (M, H, C, K)
    to_end: Tensor  # (M, H, C, K)
    whole: Tensor  # (M, H, K, 1)

    @staticmethod
    def of(g_MHCK: Tensor, dtype: torch.dtype) -> ChannelDecay:
        sum_MHCK = g_MHCK.double().cumsum(-2)  # in fp64, as in HeadDecay
        return ChannelDecay(
            sum_MHCK=sum_MHCK,
            from_start=sum_MHCK.to(dtype).exp(),
            to_end=(sum_MHCK[..., -1:, :] - sum_MHCK).to(dtype).exp(),
            whole=sum_MHCK[..., -1, :, None].to(dtype).exp(),
        )

    def scores(self, k_MHCK: Tensor, *readers_MHCK: Tensor) -> tuple[Tensor, ...]:
        """Return sum_k x_ik k_jk exp(G_ik - G_jk), 0 for j > i, for each reader x."""
        # A view: k may be a reader too, and torch.compile breaks at an autograd function that gets
        # one tensor twice.
        k_MHCK = k_MHCK.view_as(k_MHCK)
        return DecayedScores.apply(k_MHCK, self.sum_MHCK, *readers_MHCK)  # pyright: ignore[reportReturnType]
