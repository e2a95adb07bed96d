"""Runs of two ranks that are killed at twenty moments each, and what is left of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.LT2.chaos import NEVER, Death, batches_read, live
from tests.LT2.tiny_run import assert_same_run, write_corpus

N_KILLS = 20
STEPS = 60
OPTIONS = {
    "steps": STEPS,
    "model.dim": 16,
    "model.n_layers": 1,
    "model.mixer": "full",
    "model.attention_pattern": None,
    "data.seq_len": 16,
    "data.prefetch_size": 3,
    "checkpoint.dump.every": 2,
    "checkpoint.dump.keep": 2,
    "checkpoint.eval.every": 5,
    "checkpoint.eval.keep": 1,
    "distributed.fsdp_type": "full_shard",
    "distributed.spawn_method": "fork",  # no server of their own for data workers that are not
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


def test_twenty_kills_change_no_bit(data, undisturbed, tmp_path):
    rng = random.Random(0)
    folder = tmp_path / "run"
    for life in range(N_KILLS):
        death = Death.draw(rng, world_size=2)
        assert not live(folder, data, OPTIONS, life, world_size=2, death=death), "not killed"
    assert live(folder, data, OPTIONS, N_KILLS, world_size=2, death=NEVER)
    assert_same_run(folder, undisturbed, STEPS)
    assert batches_read(folder) == batches_read(undisturbed)
