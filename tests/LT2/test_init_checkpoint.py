"""Runs that start from the checkpoint of another one, and outlive it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lingua.checkpoint import consolidate_checkpoints
from lingua.errors import UserError
from tests.LT2.tiny_run import (
    OPTIONS,
    SMALL,
    assert_same_run,
    checkpoint,
    column,
    stopped_after,
    train,
)

N = OPTIONS["steps"]


@pytest.fixture(scope="module")
def other(data, tmp_path_factory) -> Path:
    return train(data, tmp_path_factory.mktemp("other"), **SMALL, seed=11)


def test_weights_begin_a_new_run_and_are_not_needed_again(data, other, tmp_path):
    source = consolidate_checkpoints(shutil.copytree(checkpoint(other, N), tmp_path / "source"))
    options = {**SMALL, "checkpoint.init_ckpt_path": source}
    train(data, tmp_path / "whole", **options)
    assert column(tmp_path / "whole", "optim/total_tokens")[0] < 100, "a step of its own, from 1"
    assert column(tmp_path / "whole", "loss/out")[0] < column(other, "loss/out")[0] - 0.5

    with stopped_after(3):
        train(data, tmp_path / "parts", **options)
    shutil.rmtree(tmp_path / "source")
    train(data, tmp_path / "parts", **options)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", N)


def test_weights_alone_are_nothing_to_go_on_from(data, other, tmp_path):
    file = consolidate_checkpoints(checkpoint(other, N)) / "consolidated.pth"
    options = {"checkpoint.init_ckpt_path": file, "checkpoint.continue_training_from_init": True}
    with pytest.raises(UserError, match=f"{file} has no .metadata: .*leave it false"):
        train(data, tmp_path / "run", **SMALL, **options)
    assert not (tmp_path / "run").exists()
