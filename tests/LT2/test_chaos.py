"""Runs that are killed repeatedly and resumed."""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from lingua.data import build_dataloader_from_args, init_dataloader_state_from_args
from tests.LT2.chaos import NEVER, Death, batch_id, live, records_that_count, steps_taken_again
from tests.LT2.tiny_run import assert_same_run, train_args, write_corpus

N_KILLS = 4
STEPS = 16
EVERY = 2  # steps between checkpoints
OPTIONS = {
    "steps": STEPS,
    "model.dim": 16,
    "model.n_layers": 1,
    "model.mixer": "full",
    "model.attention_pattern": None,
    "data.seq_len": 16,
    "data.prefetch_size": 3,
    "checkpoint.dump.every": EVERY,
    "checkpoint.dump.keep": 2,
    "checkpoint.eval.every": 5,
    "checkpoint.eval.keep": 1,
    "distributed.fsdp_type": "full_shard",
    "distributed.spawn_method": "fork",  # no forkserver: data.load_async is off
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), n_lines=60)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert live(folder, data, OPTIONS, life=0, world_size=2, death=NEVER)
    return folder


def test_kills_change_no_bit(data, undisturbed, tmp_path):
    rng = random.Random(3)
    folder = tmp_path / "run"
    n_inside_a_save = 0
    for life in range(N_KILLS):
        death = Death.draw(rng, world_size=2)
        assert not live(folder, data, OPTIONS, life, world_size=2, death=death), "not killed"
        n_inside_a_save += is_inside_a_save(folder)
    assert n_inside_a_save >= 1
    assert live(folder, data, OPTIONS, N_KILLS, world_size=2, death=NEVER)
    assert max(steps_taken_again(folder)) == EVERY - 1, "a complete checkpoint is lost"
    assert_same_run(folder, undisturbed, STEPS)
    assert batches(folder) == batches(undisturbed)


# data streams: the number of ranks at the start; each seed kills some lives inside a save
@pytest.mark.parametrize("n_streams, seed", [(1, 0), (2, 2)])
def test_kills_and_new_rank_counts_skip_and_repeat_no_document(data, tmp_path, n_streams, seed):
    rng = random.Random(seed)
    folder = tmp_path / "run"
    n_kills = 5
    options = {**OPTIONS, "checkpoint.async_save": True, "grad_acc_steps": 2}
    n_inside_a_save = 0
    for life in range(n_kills):
        has_begun = any((folder / "checkpoints").glob("[0-9]" * 10))
        world_size = rng.choice([1, 2]) if has_begun else n_streams
        death = Death.draw(rng, world_size)
        assert not live(folder, data, options, life, world_size, death), "not killed"
        n_inside_a_save += is_inside_a_save(folder)
    assert n_inside_a_save >= 1
    assert live(folder, data, options, n_kills, world_size=1, death=NEVER)

    # A save must finish before the next starts.
    assert max(steps_taken_again(folder)) <= 2 * EVERY - 1
    read = records_that_count(folder)
    assert {r["step"] for r in read} == set(range(STEPS))
    assert {r["world"] for r in read} == {1, 2}, "the number of ranks never changed"
    want = whole_streams(data, options, n_streams, n_batches=len(read))
    assert [r["batch"] for r in read] == want


def is_inside_a_save(folder: Path) -> bool:
    """Return whether the kill left a folder that was being written, replaced or deleted."""
    return any((folder / "checkpoints").glob("0*.*"))


def batches(folder: Path) -> list[str]:
    return [record["batch"] for record in records_that_count(folder)]


def whole_streams(data: Path, options: dict, n_streams: int, n_batches: int) -> list[str]:
    """Return the first batches of a run with `n_streams` ranks throughout."""
    args = train_args(data, data / "unused", **options)
    args = replace(args.data, seed=args.seed)
    with ExitStack() as stack:
        states = [init_dataloader_state_from_args(args, i, n_streams) for i in range(n_streams)]
        loaders = [build_dataloader_from_args(args, state) for state in states]
        streams = [stack.enter_context(loader) for loader in loaders]
        return [batch_id(next(streams[i % n_streams])[0]) for i in range(n_batches)]
