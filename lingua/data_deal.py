"""The data of a run that goes on with another number of data-parallel ranks.

Every rank that saved had a stream of batches of its own. Those streams stay as they are, cut loose
from the ranks, and their batches are dealt out in turn: batch g of the run is the next one of
stream g % n_streams, and rank r of n takes batches r, r + n, r + 2n, ... counted from the batch at
which the run was resumed. So each batch of each stream is read by one rank, once, however often the
number of ranks changes.

    2 streams a, b saved by 2 ranks        1 rank:   a0 b0 a1 b1 ...
                                           4 ranks:  a0 a2 .. | b0 b2 .. | a1 a3 .. | b1 b3 ..

Ranks that share a stream each read all of it and pass over what is not theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypedDict, TypeGuard, cast

from lingua.packing import PrefetchState


class StreamState(TypedDict):
    state: PrefetchState
    n_taken: int  # batches that it gave since the streams were first dealt


class DealtState(TypedDict):
    streams: dict[str, StreamState]  # those that this rank reads, by number
    n_streams: int
    turn: int  # the batch that this rank takes next, counted over all streams
    n_ranks: int


DataState = PrefetchState | DealtState
Builder = Callable[[PrefetchState], AbstractContextManager[Iterator[tuple[Any, PrefetchState]]]]


def is_dealt(state: DataState) -> TypeGuard[DealtState]:
    return "streams" in state


def deal_streams(states: Sequence[DataState], rank: int, n_ranks: int) -> DealtState:
    """Where `rank` of `n_ranks` goes on after a step that left other ranks at `states`."""
    streams, turn = _joined_streams(states)
    n_streams = len(streams)
    for number, stream in streams.items():
        expected = max(0, -(-(turn - number) // n_streams))
        assert stream["n_taken"] == expected, (
            f"stream {number} gave {stream['n_taken']} of {turn} batches: ranks at several steps"
        )
    own = (turn + rank) % math.gcd(n_streams, n_ranks)
    return DealtState(
        streams={
            str(number): stream
            for number, stream in streams.items()
            if number % math.gcd(n_streams, n_ranks) == own
        },
        n_streams=n_streams,
        turn=turn + rank,
        n_ranks=n_ranks,
    )


def _joined_streams(states: Sequence[DataState]) -> tuple[dict[int, StreamState], int]:
    """Each stream where the rank that is furthest in it has left it, and the next batch."""
    first = states[0]
    if not is_dealt(first):
        plain = cast(Sequence[PrefetchState], states)
        return {i: StreamState(state=state, n_taken=0) for i, state in enumerate(plain)}, 0
    furthest: dict[int, StreamState] = {}
    for state in cast(Sequence[DealtState], states):
        for key, stream in state["streams"].items():
            number = int(key)
            if number not in furthest or stream["n_taken"] > furthest[number]["n_taken"]:
                furthest[number] = stream
    assert len(furthest) == first["n_streams"], "a stream of the saved run is missing"
    return dict(sorted(furthest.items())), first["turn"]


@contextmanager
def open_dealt(state: DealtState, build: Builder) -> Iterator[Iterator[tuple[Any, DealtState]]]:
    """This rank's batches, each with the state that goes on after it."""
    with ExitStack() as stack:
        opened = {
            key: stack.enter_context(build(stream["state"]))
            for key, stream in state["streams"].items()
        }
        yield _take_turns(opened, state)


def _take_turns(
    opened: dict[str, Iterator[tuple[Any, PrefetchState]]], state: DealtState
) -> Iterator[tuple[Any, DealtState]]:
    streams, turn = state["streams"], state["turn"]
    while True:
        key, place = str(turn % state["n_streams"]), turn // state["n_streams"]
        batch, after = next(opened[key])
        for _ in range(place - streams[key]["n_taken"]):
            batch, after = next(opened[key])
        streams = {**streams, key: StreamState(state=after, n_taken=place + 1)}
        turn += state["n_ranks"]
        yield batch, DealtState(**{**state, "streams": streams, "turn": turn})
