"""Resume data streams with a different number of data-parallel ranks.

Every saved rank had one stream of batches. These streams are placed end to end along the new ranks,
so that each rank takes the same number of batches from as few streams as possible:

    3 streams a, b, c on 2 ranks            a a b b c c     a round: 3 batches per rank,
                                            0 0 0 1 1 1     2 per stream
    rank 0 takes a0 a1 b1, a2 a3 b3, ...    rank 1 takes b0 c0 c1, b2 c2 c3, ...

A stream that several ranks share (b) gives its next batch by step first, then by rank. So after
any step, all ranks together have read a prefix of each stream. Every batch is read by one rank,
once, however often the number of ranks changes.

The cost: ranks that share a stream each read and tokenize all of it, and skip the other ranks'
batches. A rank opens at most ceil(n_streams / n_ranks) + 1 streams, each with a buffer of
`data.prefetch_size` batches. It reads less than 1 + 2 n_ranks / n_streams times the tokens that it
trains on. If n_ranks divides n_streams, nothing is shared; twice the ranks read twice their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, TypeGuard, cast

from lingua.dataloader.packing import PrefetchState
from lingua.dataloader.synthetic.stream import TaskState

SourceState = PrefetchState | TaskState


class StreamState(TypedDict):
    state: SourceState
    n_taken: int  # batches that any rank has taken since resharding


class ReshardedState(TypedDict):
    streams: dict[str, StreamState]  # the streams that this rank reads, by number
    n_streams: int
    rank: int
    n_ranks: int
    n_read: int  # batches that this rank has taken since resharding


DataState = SourceState | ReshardedState
Builder = Callable[[SourceState], AbstractContextManager[Iterator[tuple[Any, SourceState]]]]


def is_resharded(state: DataState) -> TypeGuard[ReshardedState]:
    return "streams" in state


def streams_of(state: DataState) -> list[SourceState]:
    """Return the states of all streams that a rank reads."""
    if is_resharded(state):
        return [stream["state"] for stream in state["streams"].values()]
    return [cast(SourceState, state)]


@dataclass(frozen=True)
class ReshardPlan:
    """Assigns the batches of streams to ranks; `n` counts the batches of a rank."""

    n_streams: int
    n_ranks: int

    @property
    def batches_per_rank(self) -> int:
        """Batches that a rank takes per round."""
        return self.n_streams // math.gcd(self.n_streams, self.n_ranks)

    @property
    def batches_per_stream(self) -> int:
        """Batches that a stream gives per round."""
        return self.n_ranks // math.gcd(self.n_streams, self.n_ranks)

    def streams(self, rank: int) -> list[int]:
        return sorted({self.stream(rank, n) for n in range(self.batches_per_rank)})

    def stream(self, rank: int, n: int) -> int:
        """Return the stream of the n-th batch of `rank`."""
        slot = rank * self.batches_per_rank + n % self.batches_per_rank
        return slot // self.batches_per_stream

    def position(self, rank: int, n: int) -> int:
        """Return how many batches of its stream are taken before the n-th batch of `rank`."""
        stream, (rounds, step) = self.stream(rank, n), divmod(n, self.batches_per_rank)
        per_rank, per_stream = self.batches_per_rank, self.batches_per_stream
        first, last = stream * per_stream // per_rank, ((stream + 1) * per_stream - 1) // per_rank
        taken = sum(
            self.stream(other, i) == stream
            for other in range(first, last + 1)  # the ranks that share the stream
            for i in range(step + 1)
            if (i, other) < (step, rank)
        )
        return rounds * per_stream + taken


def reshard_streams(states: Sequence[DataState], rank: int, n_ranks: int) -> ReshardedState:
    """Return where `rank` of `n_ranks` resumes from the states that all saved ranks had."""
    streams = _furthest_streams(states)
    own = ReshardPlan(len(streams), n_ranks).streams(rank)
    return ReshardedState(
        streams={str(number): StreamState(state=streams[number], n_taken=0) for number in own},
        n_streams=len(streams),
        rank=rank,
        n_ranks=n_ranks,
        n_read=0,
    )


def _furthest_streams(states: Sequence[DataState]) -> list[SourceState]:
    """Return each stream in the state of the rank that has read furthest into it."""
    first = states[0]
    if not is_resharded(first):
        return list(cast(Sequence[SourceState], states))
    furthest: dict[int, StreamState] = {}
    for state in cast(Sequence[ReshardedState], states):
        assert state["n_read"] == first["n_read"], "ranks are at different steps"
        for key, stream in state["streams"].items():
            number = int(key)
            if number not in furthest or stream["n_taken"] > furthest[number]["n_taken"]:
                furthest[number] = stream
    assert len(furthest) == first["n_streams"], "a stream of the saved run is missing"
    return [furthest[number]["state"] for number in range(first["n_streams"])]


@contextmanager
def open_resharded(
    state: ReshardedState, build: Builder
) -> Iterator[Iterator[tuple[Any, ReshardedState]]]:
    """Iterate over this rank's batches, each with the state that resumes after it."""
    with ExitStack() as stack:
        opened = {
            key: stack.enter_context(build(stream["state"]))
            for key, stream in state["streams"].items()
        }
        yield _interleave(opened, state)


def _interleave(
    opened: dict[str, Iterator[tuple[Any, SourceState]]], state: ReshardedState
) -> Iterator[tuple[Any, ReshardedState]]:
    plan, rank = ReshardPlan(state["n_streams"], state["n_ranks"]), state["rank"]
    streams, n = state["streams"], state["n_read"]
    while True:
        key, position = str(plan.stream(rank, n)), plan.position(rank, n)
        for _ in range(position - streams[key]["n_taken"]):
            next(opened[key])  # another rank's batch
        batch, after = next(opened[key])
        streams = {**streams, key: StreamState(state=after, n_taken=position + 1)}
        n += 1
        yield batch, ReshardedState(**{**state, "streams": streams, "n_read": n})
