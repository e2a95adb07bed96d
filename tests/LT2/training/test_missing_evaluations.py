"""Which evaluations a resumed run repeats, if separate jobs make them, and which it drops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from apps.LT2.training.evaluation import Evaluator, find_missing_harness_step
from lingua.evaluations import read_evaluations
from tests.lingua.stool_utils import held
from tests.LT2.tiny_run import train_args, write_corpus


@pytest.fixture
def args(tmp_path):
    """A run whose evaluation job of step 6 has started, without SLURM."""
    run = tmp_path / "run"
    (run / "checkpoints" / "0000000006").mkdir(parents=True)
    folder = run / "evals" / "0000000006"
    folder.mkdir(parents=True)
    (folder / "submit.slurm").touch()
    options = {"eval.harness.tasks": "[lt2_local]", "async_eval_gpus": 1}
    options["checkpoint.path"] = run / "checkpoints"
    return train_args(write_corpus(tmp_path / "data"), run, **options)


def test_a_job_that_ended_without_scores_is_repeated(args):
    assert find_missing_harness_step(args, 6) == 6


def test_a_job_that_runs_or_has_scores_is_not_repeated(args, tmp_path):
    with held(tmp_path / "run" / "evals" / "0000000006"):
        assert find_missing_harness_step(args, 6) is None
    (tmp_path / "run" / "metrics.eval.jsonl").write_text('{"global_step": 6}\n')
    assert find_missing_harness_step(args, 6) is None


def test_a_job_that_may_be_in_the_queue_is_not_repeated(args, monkeypatch):
    monkeypatch.setattr("apps.LT2.training.evaluation.has_slurm", lambda: True)
    assert find_missing_harness_step(args, 6) is None


def test_scores_of_dropped_checkpoints_are_dropped(args, tmp_path):
    run = tmp_path / "run"
    for log in ("metrics.eval.jsonl", "metrics.validation.jsonl"):
        lines = [f'{{"global_step": {step}, "loss/val": 2.5}}\n' for step in (1, 2)]
        (run / log).write_text("".join(lines))
    args.async_eval_gpus = None
    trainer: Any = SimpleNamespace(args=args, state=SimpleNamespace(step=1))
    metrics: Any = None
    Evaluator(trainer, metrics, None, lambda: False).catch_up()
    assert [evaluation.step for evaluation in read_evaluations(run)] == [1, 1]
