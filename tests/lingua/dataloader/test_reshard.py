"""Resharded streams: each batch is read once, in its stream's order, for changing ranks."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest

from lingua.data import build_dataloader_from_args, init_dataloader_state_from_args
from lingua.dataloader.reshard import ReshardPlan, open_resharded, reshard_streams
from tests.lingua.test_data import make_args, make_source


@contextmanager
def count_on(state):
    """A stream whose batches are (its name, their number)."""
    name, start = state["name"], state["n"]
    yield (((name, i), {"name": name, "n": i + 1}) for i in itertools.count(start))


def read(states, n):
    """Read `n` batches of every rank; return them step by step, and the states after them."""
    steps, after = [], []
    for state in states:
        with open_resharded(state, count_on) as batches:
            taken = list(itertools.islice(batches, n))
        steps.append([batch for batch, _ in taken])
        after.append(json.loads(json.dumps(taken[-1][1] if taken else state)))
    return [batch for step in zip(*steps, strict=True) for batch in step], after


def resharded(n_streams, n_ranks):
    states = [{"name": i, "n": 0} for i in range(n_streams)]
    return [reshard_streams(states, rank, n_ranks) for rank in range(n_ranks)]


@pytest.mark.parametrize("n_streams", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(5))
def test_each_batch_is_read_once_however_often_the_ranks_change(n_streams, seed):
    rng = random.Random(seed)
    states = [{"name": i, "n": 10 * i} for i in range(n_streams)]
    got = []
    for _ in range(6):
        n_ranks = rng.randint(1, 6)
        states = [reshard_streams(states, rank, n_ranks) for rank in range(n_ranks)]
        for _ in range(2):  # resumes with the same number of ranks, then with another
            read_now, states = read(states, rng.randint(0, 4))
            got += read_now
    assert got
    for stream in range(n_streams):  # in its order, without a gap
        numbers = [n for name, n in got if name == stream]
        assert numbers == [10 * stream + k for k in range(len(numbers))]


@pytest.mark.parametrize("n_streams, n_ranks", [(3, 2), (2, 3), (5, 3), (4, 6), (8, 7), (2, 1)])
def test_streams_are_read_evenly(n_streams, n_ranks):
    n_batches = 3 * ReshardPlan(n_streams, n_ranks).batches_per_rank
    got, _ = read(resharded(n_streams, n_ranks), n_batches)
    assert len(set(got)) == len(got)
    assert set(Counter(name for name, _ in got).values()) == {len(got) // n_streams}


def test_a_rank_opens_only_the_streams_that_it_reads():
    for n_streams, n_ranks, most in (
        *((4, 2, 2), (4, 4, 1), (4, 8, 1), (4, 6, 2), (4, 3, 2), (8, 7, 2)),
        *((64, 63, 2), (63, 64, 2), (64, 24, 4), (5, 13, 2), (1, 7, 1)),
    ):
        assert max(len(state["streams"]) for state in resharded(n_streams, n_ranks)) == most
        assert most <= math.ceil(n_streams / n_ranks) + 1


@pytest.mark.parametrize("n_streams, n_ranks", [(64, 63), (63, 64), (8, 3), (8, 12), (5, 13)])
def test_the_number_of_skipped_batches_is_bounded(n_streams, n_ranks):
    n_opened = Counter()

    @contextmanager
    def count(state):
        yield ((n_opened.update([rank]), {**state}) for _ in itertools.count())

    n = 2 * ReshardPlan(n_streams, n_ranks).batches_per_rank
    for rank, state in enumerate(resharded(n_streams, n_ranks)):  # noqa: B007 (read by `count`)
        with open_resharded(state, count) as batches:
            list(itertools.islice(batches, n))
    assert max(n_opened.values()) < (1 + 2 * n_ranks / n_streams) * n


def test_states_of_different_steps_are_refused():
    states = resharded(1, 2)
    with open_resharded(states[1], count_on) as batches:
        _, states[1] = next(batches)
    with pytest.raises(AssertionError, match="different steps"):
        reshard_streams(states, 0, 1)


@pytest.mark.parametrize("load_async", [False, True])
def test_the_loader_resumes_resharded_streams(tmp_path, load_async):
    make_source(tmp_path / "text", [f"document {i}" for i in range(40)], n_chunks=2)
    args = make_args(tmp_path, sources={"text": 1.0})
    alone = [init_dataloader_state_from_args(args, rank, 2) for rank in range(2)]
    want = []
    for state in alone:
        with build_dataloader_from_args(replace(args, load_async=False), state) as batches:
            want.append([batch.tolist() for batch, _ in itertools.islice(batches, 4)])
    state = reshard_streams(alone, rank=0, n_ranks=1)
    args = replace(args, load_async=load_async, root_dir=str(tmp_path))
    with build_dataloader_from_args(args, state) as batches:
        got = [batch.tolist() for batch, _ in itertools.islice(batches, 8)]
    assert got == [batch for step in zip(*want, strict=True) for batch in step]
