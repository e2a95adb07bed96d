"""Runs on a synthetic task: metrics, resume, and evaluation of the checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from apps.LT2.describe import describe, read_config
from apps.LT2.eval import launch_eval
from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.generate import main as generate
from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.scripts.export_weights import ExportArgs, export
from apps.LT2.train import TrainArgs, validate_train_args
from lingua.args import dataclass_from_dict, parse_args
from lingua.dataloader.packing import NO_TARGET
from lingua.dataloader.synthetic.args import TaskArgs, build_task
from lingua.errors import UserError
from lingua.files.jsonl_log import read_jsonl_records
from lingua.runs import read_runs
from tests.LT2.tiny_run import (
    OPTIONS,
    SMALL,
    assert_same_run,
    clean_process,
    column,
    fingerprint,
    stopped_after,
    without_code_copy,
)
from tests.LT2.tiny_run import app as train_app

TEXT_ONLY = ("data.seq_len", "data.tokenizer.name")
TASK = {
    **{name: value for name, value in OPTIONS.items() if name not in TEXT_ONLY},
    **SMALL,
    "steps": 4,
    "grad_acc_steps": 2,
    "data.batch_size": 3,
    "data.task.name": "state_tracking",
    "data.task.n": 5,
    "data.task.n_addresses": 16,
    "eval.validation.max_steps": 10,  # no multiple of the batch
    "checkpoint.eval.every": 4,
    "checkpoint.dump.every": 4,
}
EXAMPLES = build_task(TaskArgs(name="state_tracking", n=5, n_addresses=16))
LONGER = build_task(TaskArgs(name="state_tracking", n=9, n_addresses=16))


def train_args(dump_dir, **changes):
    options = TASK | {"dump_dir": dump_dir} | changes
    given = [f"{name}={'null' if value is None else value}" for name, value in options.items()]
    return parse_args(TrainArgs, given)


def train(dump_dir, **changes):
    with clean_process(), without_code_copy():
        train_app.train(train_args(dump_dir, **changes))
    return dump_dir


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("task") / "run")


def loss_and_accuracy(run, views):
    model = load_model_and_tokenizer(str(run), dtype="fp32", device="cpu").model
    tokens, targets = torch.from_numpy(views).unbind(-1)
    logits, is_answer = model(tokens), targets != NO_TARGET
    found, wanted = logits[is_answer], targets[is_answer]
    accuracy = (found.argmax(-1) == wanted).float().mean().item()
    return F.cross_entropy(found, wanted).item(), accuracy


def test_metrics_are_of_the_answers_alone(tmp_path):
    frozen = train(tmp_path / "run", **{"optim.lr": 1e-12, "eval.validation.max_steps": 200})
    losses, accuracies = column(frozen, "loss/out"), column(frozen, "acc/out")
    for step in range(4):  # of 2 micro-batches of 3 examples
        views = EXAMPLES.examples(7, np.arange(6 * step, 6 * step + 6), held_out=False)
        want = loss_and_accuracy(frozen, views)
        assert (losses[step], accuracies[step]) == pytest.approx(want, rel=1e-5)
    held_out = EXAMPLES.examples(7, np.arange(200), held_out=True)
    want = loss_and_accuracy(frozen, held_out)
    assert want[1] > 0
    (loss,), (accuracy,) = column(frozen, "loss/val"), column(frozen, "acc/val")
    assert (loss, accuracy) == pytest.approx(want, rel=1e-5)
    assert not column(frozen, "loss/val_bpb")


@pytest.mark.parametrize("loop_loss", ["none", "uniform"])
def test_a_resumed_run_equals_one_without_a_stop(run, tmp_path, loop_loss):
    changes = {"model.loop_loss": loop_loss}
    whole = run if loop_loss == "none" else train(tmp_path / "whole", **changes)
    with stopped_after(2):
        train(tmp_path / "run", **changes)
    assert_same_run(train(tmp_path / "run", **changes), whole, 4)


def test_a_checkpoint_is_evaluated_on_longer_examples(run):
    def evaluate(**validation):
        options = {"ckpt_dir": str(run), "validation": {"max_steps": 10, **validation}}
        with clean_process():
            return launch_eval(dataclass_from_dict(EvalArgs, options))["validation"]

    views = EXAMPLES.examples(7, np.arange(10), held_out=True)
    assert (evaluate()["acc/val"],) == tuple(column(run, "acc/val"))
    longer = evaluate(task={"n": 9})
    views = LONGER.examples(7, np.arange(10), held_out=True)
    assert (longer["loss/val"], longer["acc/val"]) == pytest.approx(loss_and_accuracy(run, views))
    record = json.loads((run / "evals/0000000004-n=9/validation.json").read_text())
    assert record["differs_from_run"] == {"validation.task.n": 9}
    for bad in ({"n": 99}, {"n_addresses": 99}, {"name": "foo"}):
        with pytest.raises(UserError, match="validation.task"):
            evaluate(task=bad)


def test_a_model_of_a_task_reads_no_text(run, tmp_path):
    for command in (
        lambda: generate([f"ckpt={run}", "prompts=[hi]", "device=cpu"]),
        lambda: export(ExportArgs(ckpt=str(run), out=str(tmp_path / "hf"), format="hf")),
    ):
        with pytest.raises(UserError, match="data.task.name=state_tracking"):
            command()
    export(ExportArgs(ckpt=str(run), out=str(tmp_path / "st"), format="consolidated"))
    exported = load_model_and_tokenizer(str(tmp_path / "st"), dtype="fp32", device="cpu").model
    assert exported.args.vocab_size == EXAMPLES.n_tokens


def test_vocabulary_and_length_follow_the_task(tmp_path):
    args = validate_train_args(train_args(tmp_path / "run"), world_size=1)
    assert args.model.vocab_size == EXAMPLES.n_tokens
    assert args.data.seq_len == args.model.max_seqlen == EXAMPLES.seq_len
    for option, value in {
        "model.vocab_size": 10,
        "data.seq_len": 10,
        "data.sources.x": 1,
        "data.task.name": "foo",
        "eval.validation.task.n": 99,
        "eval.harness.tasks": "[x]",
        "data.doc_mask": True,
        "data.pretokenized": True,
    }.items():
        with pytest.raises(UserError, match=re.sub(r"\.(x|tasks)$", "", option)):
            validate_train_args(train_args(tmp_path / "run", **{option: value}), world_size=1)


def test_the_name_alone_is_a_task_too():
    given = ["data.task.n=7", "data.task=copy", "eval.validation.task=needle"]
    args = parse_args(TrainArgs, given)
    assert args.data.task == TaskArgs(name="copy", n=7)
    assert args.eval is not None and args.eval.validation is not None
    assert args.eval.validation.task == TaskArgs(name="needle")
    assert parse_args(TrainArgs, [*given[:2], "data.task=null"]).data.task is None


def test_a_recipe_with_a_task_is_described(run):
    args = read_config(str(run / "config.yaml"), ["data.seq_len=2048", "data.task.n=7"])
    assert describe(args, 1, 1.0)["seq_len"] == args.data.seq_len
    assert args.model.vocab_size == EXAMPLES.n_tokens


# ---- eval.stop_at

STOPPING = {"checkpoint.eval.every": 2, "eval.stop_at": "loss/val<=99"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("stopped") / "run", **STOPPING)


def steps_of(folder) -> list[int]:
    return sorted(set(column(folder, "global_step")))


def test_a_run_that_reaches_its_target_is_finished(stopped, run, capfd):
    (record,) = [r for r in read_jsonl_records(stopped / "metrics.jsonl") if "acc/val" in r]
    assert record["global_step"] == 2 and record["ended_by"] == "eval.stop_at=loss/val<=99"
    assert column(stopped, "loss/out") == column(run, "loss/out")[:2]
    assert read_runs([stopped])[0].status == "finished"
    before = fingerprint(stopped)
    train(stopped, **STOPPING)
    assert fingerprint(stopped) == before
    assert "eval.stop_at=loss/val<=99 is reached: nothing to do" in capfd.readouterr().out
    with pytest.raises(UserError, match="finished run: optim.clip"):
        train(stopped, **STOPPING, **{"optim.clip": 2.0})


@pytest.mark.parametrize("target, last", [("loss/val>=99", 4), ("acc/val>=0", 2), (None, 4)])
def test_another_target_decides_again(stopped, run, tmp_path, target, last):
    """The run resumes if it has not reached the new target."""
    other = shutil.copytree(stopped, tmp_path / "run")
    with nullcontext() if last == 4 else pytest.raises(UserError, match="eval.stop_at"):
        train(other, **{**STOPPING, "eval.stop_at": target})
    assert steps_of(other)[-1] == last
    if last == 4:
        assert column(other, "loss/out") == column(run, "loss/out")
        assert read_runs([other])[0].status == "finished"


@pytest.mark.parametrize("is_measured", [True, False])
def test_a_run_killed_at_its_target_takes_no_further_step(
    stopped, tmp_path, monkeypatch, is_measured
):
    other = shutil.copytree(stopped, tmp_path / "run")
    if not is_measured:
        lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
        (other / "metrics.jsonl").write_text("".join(x for x in lines if "acc/val" not in x))
    monkeypatch.setattr(train_app, "is_finished", lambda args: False)
    train(other, **STOPPING)
    assert steps_of(other) == [1, 2] and len(column(other, "ended_by")) == 1


@pytest.mark.parametrize(
    "stop_at, words",
    [
        ("acc/val", "must compare"),
        ("acc/val>0.9", "must compare"),
        ("acc/val>=high", "must compare"),
        ("acc/val>=nan", "must compare"),
        ("loss/val_bpb<=1", "it has loss/val, acc/val"),
        ("acc/val/3>=0.9", "acc/val/2"),
    ],
)
def test_mistakes_of_stop_at(tmp_path, stop_at, words):
    changes = {"eval.stop_at": stop_at, "eval.loop_counts": "[1,2]"}
    with pytest.raises(UserError, match=f"stop_at={stop_at}.*{words}"):
        validate_train_args(train_args(tmp_path, **changes))
    with pytest.raises(UserError, match=r"stop_at=acc/val>=0.9 .*none"):
        changes |= {"eval.stop_at": "acc/val>=0.9", "eval.validation": None}
        validate_train_args(train_args(tmp_path, **changes))
