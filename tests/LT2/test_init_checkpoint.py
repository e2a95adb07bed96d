"""Runs that start from the checkpoint of another run."""

from __future__ import annotations

import json
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


def test_a_run_starts_from_weights_and_resumes_without_them(data, other, tmp_path):
    source = consolidate_checkpoints(shutil.copytree(checkpoint(other, N), tmp_path / "source"))
    options = {**SMALL, "checkpoint.init_ckpt_path": source}
    train(data, tmp_path / "whole", **options)
    assert column(tmp_path / "whole", "optim/total_tokens")[0] < 100, "the new run starts at step 1"
    assert column(tmp_path / "whole", "loss/out")[0] < column(other, "loss/out")[0] - 0.5

    with stopped_after(3):
        train(data, tmp_path / "parts", **options)
    shutil.rmtree(tmp_path / "source")
    train(data, tmp_path / "parts", **options)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", N)


@pytest.mark.parametrize("continues, steps", [(False, 1), (True, N + 1)])
def test_a_run_starts_from_the_newest_checkpoint_of_a_run(continues, steps, data, other, tmp_path):
    options = {**SMALL, "seed": 11, "eval.validation": None, "steps": steps}
    options |= {
        "checkpoint.init_ckpt_path": other,
        "checkpoint.continue_training_from_init": continues,
    }
    run = train(data, tmp_path, **options)
    said = "resumed from" if continues else "initial weights:"
    assert f"{said} {checkpoint(other, N)}" in (run / "train.log").read_text()
    assert len(column(run, "loss/out")) == 1


def test_continuing_from_a_weight_file_fails(data, other, tmp_path):
    file = consolidate_checkpoints(checkpoint(other, N)) / "consolidated.pth"
    options = {"checkpoint.init_ckpt_path": file, "checkpoint.continue_training_from_init": True}
    with pytest.raises(
        UserError, match=r"continue_training_from_init=true.*init_ckpt_path=.*\.metadata"
    ):
        train(data, tmp_path / "run", **SMALL, **options)
    assert not (tmp_path / "run").exists()


def differences(run: Path) -> list[str]:
    marker = "model differs from checkpoint.init_ckpt_path: "
    lines = (run / "train.log").read_text().splitlines()
    return [line.partition(marker)[2] for line in lines if marker in line]


@pytest.mark.parametrize(
    "changes, want",
    [
        ({}, []),
        # The weights fit, but are used in another way.
        ({"model.n_heads": 4}, ["model.n_heads: 2 -> 4"]),
        ({"model.norm_eps": 1e-3, "seed": 3}, ["model.norm_eps: 1e-05 -> 0.001"]),
    ],
)
@pytest.mark.parametrize("form", ["folder", "file", "without config"])
def test_weights_of_another_model_are_reported(form, changes, want, data, other, tmp_path):
    source = checkpoint(other, N)
    if form != "folder":
        source = shutil.copytree(consolidate_checkpoints(source), tmp_path / "weights")
    if form == "without config":
        (source / "params.json").unlink()
        want = []
    options = {"checkpoint.init_ckpt_path": source, "eval.validation": None, "steps": 1}
    run = train(data, tmp_path / "run", **SMALL, **options, **changes)
    assert differences(run) == want


def test_a_tokenizer_that_no_longer_exists_is_a_difference(data, other, tmp_path):
    source = shutil.copytree(consolidate_checkpoints(checkpoint(other, N)), tmp_path / "weights")
    config = json.loads((source / "params.json").read_text())
    config["data"]["tokenizer"]["name"] = "mock"
    (source / "params.json").write_text(json.dumps(config))
    options = {"checkpoint.init_ckpt_path": source, "eval.validation": None, "steps": 1}
    run = train(data, tmp_path / "run", **SMALL, **options)
    assert differences(run) == ["data.tokenizer.name: mock -> bytes"]


@pytest.mark.parametrize("text", ["{", '{"model": {"loop_count": "x"}, "data": {}}'])
def test_a_damaged_config_next_to_weights_is_named(text, data, other, tmp_path):
    source = shutil.copytree(consolidate_checkpoints(checkpoint(other, N)), tmp_path / "weights")
    (source / "params.json").write_text(text)
    with pytest.raises(UserError, match=r"checkpoint\.init_ckpt_path: .*params\.json"):
        train(data, tmp_path / "run", **SMALL, **{"checkpoint.init_ckpt_path": source})


@pytest.mark.parametrize("steps", [N - 1, N])
def test_a_continued_run_needs_steps_that_are_left(steps, data, other, tmp_path):
    source = {"checkpoint.init_ckpt_path": checkpoint(other, N), "steps": steps}
    with pytest.raises(UserError, match=f"steps={steps}"):
        train(
            data,
            tmp_path / "run",
            **SMALL,
            **source,
            **{"checkpoint.continue_training_from_init": True},
        )
    assert not (tmp_path / "run").exists()
