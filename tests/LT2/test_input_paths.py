"""stool's override deletes nothing that a training run or an evaluation reads."""

from __future__ import annotations

from pathlib import Path

import pytest

import apps.LT2.eval as evaluation
import apps.LT2.train as training
from apps.LT2.evaluation.args import EvalArgs, LMHarnessArgs
from apps.LT2.evaluation.validation import ValidationArgs
from apps.LT2.training.args import TrainArgs
from lingua.checkpoint import CheckpointArgs
from lingua.dataloader.args import DataArgs
from lingua.errors import UserError
from lingua.slurm.plan import check_not_read
from lingua.tokenizer import TokenizerArgs


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder that has the inputs of others in it."""
    run = tmp_path / "runs" / "old"
    for folder in ("corpus", "val", "checkpoints/0000000002"):
        (run / folder).mkdir(parents=True)
    for name in ("corpus/a.chunk.00.jsonl", "tokenizer.json", "task.yaml", "answers.db"):
        (run / name).write_text("")
    return run


def data(root: Path, source: str = "corpus", tokenizer: Path | None = None) -> DataArgs:
    path = None if tokenizer is None else str(tokenizer)
    return DataArgs(str(root), {source: 1.0}, tokenizer=TokenizerArgs("hf", path))


def test_what_training_reads_is_found(run, tmp_path):
    linked, beside = tmp_path / "linked", tmp_path / "beside"
    (linked / "text").mkdir(parents=True)
    (linked / "text" / "b.chunk.00.jsonl").symlink_to(run / "corpus" / "a.chunk.00.jsonl")
    (beside / "corpus").mkdir(parents=True)
    checkpoint = str(run / "checkpoints" / "0000000002")
    harness = LMHarnessArgs(tasks=[str(run / "task.yaml")])
    cases = {
        "data.sources.corpus": TrainArgs(data=data(run)),
        "data.sources.old/corpus": TrainArgs(data=data(run.parent, "old/corpus")),
        "data.sources.text": TrainArgs(data=data(linked, "text")),
        "data.tokenizer.path": TrainArgs(data=data(beside, tokenizer=run / "tokenizer.json")),
        "checkpoint.init_ckpt_path": TrainArgs(
            data=data(beside), checkpoint=CheckpointArgs(init_ckpt_path=checkpoint)
        ),
        "eval.validation.sources": TrainArgs(
            eval=EvalArgs(validation=ValidationArgs(root_dir=str(run), sources=["val"]))
        ),
        "eval.harness.tasks": TrainArgs(eval=EvalArgs(harness=harness)),
    }
    for option, args in cases.items():
        with pytest.raises(UserError, match=f"would delete what {option} reads"):
            check_not_read([run], training.paths_read(args))
    # names of folders that happen to be those of other options' values
    args = TrainArgs(data=data(beside), name=str(run), dump_dir=str(run))
    check_not_read([run], training.paths_read(args))


def test_what_an_evaluation_reads_is_found(run):
    harness = LMHarnessArgs(tasks=["arc_easy"], use_cache=str(run / "answers.db"))
    cases = {
        "ckpt_dir": EvalArgs(ckpt_dir=str(run)),
        "tokenizer_path": EvalArgs(tokenizer_path=str(run / "tokenizer.json")),
        "harness.use_cache": EvalArgs(harness=harness),
    }
    for option, args in cases.items():
        with pytest.raises(UserError, match=f"would delete what {option} reads"):
            check_not_read([run], evaluation.paths_read(args))
    check_not_read([run], evaluation.paths_read(EvalArgs(dump_dir=str(run), name=str(run))))
