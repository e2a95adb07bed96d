"""The data of a run that goes on with another number of data-parallel ranks.

Every rank that saved had a stream of batches of its own. Those streams stay as they are, cut loose
from the ranks, and are laid end to end along the ranks, so that each rank gets as many batches of
as few streams as can be:

    3 streams a, b, c dealt to 2 ranks      a a b b c c      a round: 3 batches a rank, 2 a stream
                                            0 0 0 1 1 1
    rank 0 takes a0 a1 b1, a2 a3 b3, ...    rank 1 takes b0 c0 c1, b2 c2 c3, ...

A stream that several ranks share (b) gives its next batch to the rank that comes first, by steps
and then by ranks. So what all ranks have read after a step is a beginning of each stream, without
a gap, and each batch is read by one rank, once, however often the number of ranks changes.

What it costs: ranks that share a stream each read and tokenize all of it, and pass over what is not
theirs. A rank reads n_streams / n_ranks + 1 streams, rounded up, at most, and less than
1 + 2 n_ranks / n_streams times the tokens that it trains on; every stream has a buffer of
`data.prefetch_size` batches. Where one number divides the other there is least to share: fewer
ranks share nothing, and twice as many read twice their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, TypeGuard, cast

from lingua.dataloader.packing import PrefetchState


class StreamState(TypedDict):
    state: PrefetchState
    n_taken: int  # batches that it gave, to any rank, since the streams were dealt


class ReshardedState(TypedDict):
    streams: dict[str, StreamState]  # those that this rank reads, by number
    n_streams: int
    rank: int
    n_ranks: int
    n_read: int  # batches that this rank took since the streams were dealt


DataState = PrefetchState | ReshardedState
Builder = Callable[[PrefetchState], AbstractContextManager[Iterator[tuple[Any, PrefetchState]]]]


def is_resharded(state: DataState) -> TypeGuard[ReshardedState]:
    return "streams" in state


@dataclass(frozen=True)
class ReshardPlan:
    """Which batches of which streams a rank takes; `n` counts the batches of a rank."""

    n_streams: int
    n_ranks: int

    @property
    def batches_per_rank(self) -> int:
        """Batches of a rank in a round."""
        return self.n_streams // math.gcd(self.n_streams, self.n_ranks)

    @property
    def batches_per_stream(self) -> int:
        """Batches of a stream in a round."""
        return self.n_ranks // math.gcd(self.n_streams, self.n_ranks)

    def streams(self, rank: int) -> list[int]:
        return sorted({self.stream(rank, n) for n in range(self.batches_per_rank)})

    def stream(self, rank: int, n: int) -> int:
        """The stream that the n-th batch of `rank` comes from."""
        return (rank * self.batches_per_rank + n % self.batches_per_rank) // self.batches_per_stream

    def place(self, rank: int, n: int) -> int:
        """The place of that batch in its stream: how many its ranks have taken before it."""
        stream, (rounds, n) = self.stream(rank, n), divmod(n, self.batches_per_rank)
        begin, end = stream * self.batches_per_stream, (stream + 1) * self.batches_per_stream
        before = 0
        for other in range(begin // self.batches_per_rank, (end - 1) // self.batches_per_rank + 1):
            first = max(0, begin - other * self.batches_per_rank)
            last = min(self.batches_per_rank, end - other * self.batches_per_rank)
            done = n + 1 if other < rank else n
            before += min(max(done, first), last) - first
        return rounds * self.batches_per_stream + before


def reshard_streams(states: Sequence[DataState], rank: int, n_ranks: int) -> ReshardedState:
    """Where `rank` of `n_ranks` goes on after a step that left other ranks at `states`."""
    streams = _joined_streams(states)
    own = ReshardPlan(len(streams), n_ranks).streams(rank)
    return ReshardedState(
        streams={str(number): StreamState(state=streams[number], n_taken=0) for number in own},
        n_streams=len(streams),
        rank=rank,
        n_ranks=n_ranks,
        n_read=0,
    )


def _joined_streams(states: Sequence[DataState]) -> list[PrefetchState]:
    """Each stream where the rank that is furthest in it has left it."""
    first = states[0]
    if not is_resharded(first):
        return list(cast(Sequence[PrefetchState], states))
    furthest: dict[int, StreamState] = {}
    for state in cast(Sequence[ReshardedState], states):
        assert state["n_read"] == first["n_read"], "ranks at several steps"
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
    """This rank's batches, each with the state that goes on after it."""
    with ExitStack() as stack:
        opened = {
            key: stack.enter_context(build(stream["state"]))
            for key, stream in state["streams"].items()
        }
        yield _take_turns(opened, state)


def _take_turns(
    opened: dict[str, Iterator[tuple[Any, PrefetchState]]], state: ReshardedState
) -> Iterator[tuple[Any, ReshardedState]]:
    plan, rank = ReshardPlan(state["n_streams"], state["n_ranks"]), state["rank"]
    streams, n = state["streams"], state["n_read"]
    while True:
        key, place = str(plan.stream(rank, n)), plan.place(rank, n)
        batch, after = next(opened[key])
        for _ in range(place - streams[key]["n_taken"]):
            batch, after = next(opened[key])
        streams = {**streams, key: StreamState(state=after, n_taken=place + 1)}
        n += 1
        yield batch, ReshardedState(**{**state, "streams": streams, "n_read": n})
