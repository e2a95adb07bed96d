"""Evaluation of a run's checkpoints with the real harness, inside training and as a job."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import apps.LT2.train as app
from apps.LT2.eval import EvalArgs, launch_eval
from apps.LT2.training.args import find_free_gpus, validate_train_args
from apps.LT2.training.evaluation import (
    count_nodes,
    eval_parts_of_step,
    find_missing_harness_step,
)
from lingua.args import parse_args
from lingua.errors import UserError
from lingua.files.jsonl_log import read_jsonl_records
from tests.LT2 import tiny_run
from tests.LT2.test_eval import write_documents
from tests.LT2.tiny_run import SMALL, assert_same_run, checkpoint, clean_process, train_args

pytest.importorskip("lm_eval")
pytest.importorskip("submitit")

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"), n_chunks=2)
    write_documents(root / "local")
    return root


def train(data, dump_dir, **changes):
    return tiny_run.train(data, dump_dir, **SMALL, **changes)


def harness(data, **changes):
    return {
        "eval.harness.tasks": "[lt2_local_perplexity, lt2_local_copy]",
        "eval.harness.include_path": ROOT / "apps/LT2/local_tasks",
        "eval.harness.metadata": f"{{folder: {data / 'local'}}}",
        "eval.harness.limit": 2,
        "eval.harness.bootstrap_iters": 0,
        "eval.generator.max_gen_len": 4,
        **changes,
    }


def scores_by_step(dump_dir: Path) -> dict[int, dict]:
    records = read_jsonl_records(dump_dir / "metrics.eval.jsonl")
    by_step = {r.pop("global_step"): r for r in records}
    assert len(by_step) == len(records), "two records of a step"
    about = ("created_at", "made_with", "differs_from_run", "chance", "loops", "flops_per_token")
    return {step: {k: v for k, v in r.items() if k not in about} for step, r in by_step.items()}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("run") / "r", **harness(data))


def scores_of(dump_dir: Path, step: int, data: Path, folder: Path) -> dict:
    """Evaluate a checkpoint with the command."""
    options = [f"ckpt_dir={checkpoint(dump_dir, step)}", f"dump_dir={folder}", "validation=null"]
    options += [f"{k.removeprefix('eval.')}={v}" for k, v in harness(data).items()]
    with clean_process():
        return launch_eval(parse_args(EvalArgs, options))["evals"]


def test_each_checkpoint_has_its_scores(data, run, tmp_path):
    found = scores_by_step(run)
    assert sorted(found) == [3, 6]
    assert found[3] != found[6]
    assert scores_of(run, 3, data, tmp_path / "again") == found[3]
    for step, scores in found.items():
        assert set(scores) == {"lt2_local_perplexity", "lt2_local_copy"}
        results = json.loads((run / "evals" / f"{step:010d}" / "results.json").read_text())
        assert results["results"] == scores


def test_only_a_result_with_the_options_of_the_run_counts(data, run, tmp_path):
    """`apps.LT2.eval` adds records of the same step to the same file."""
    args = train_args(data, run, **harness(data))
    args = replace(args, checkpoint=replace(args.checkpoint, path=str(run / "checkpoints")))
    ((folder, conditions),), log = eval_parts_of_step(args, 6), run / "metrics.eval.jsonl"
    assert folder.dump_dir == str(run / "evals" / "0000000006") and conditions.differing == {}
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["made_with"]["harness.limit"] == 2 and last["differs_from_run"] == {}
    assert find_missing_harness_step(args, 6) is None

    at_2 = replace(args, eval=replace(args.eval, loop_count=1))
    assert find_missing_harness_step(at_2, 6) == 6, "only recorded with other options"
    ((folder, conditions),) = eval_parts_of_step(at_2, 6)
    assert folder.dump_dir == str(run / "evals" / "0000000006-loop_count=1")
    older = {k: v for k, v in last.items() if k not in ("made_with", "differs_from_run")}
    (tmp_path / log.name).write_text(json.dumps(older) + "\n")
    assert find_missing_harness_step(replace(args, dump_dir=str(tmp_path)), 6) is None


def test_evaluation_does_not_change_training(data, run, tmp_path):
    assert_same_run(run, train(data, tmp_path / "plain"), 6)


def test_an_evaluation_is_no_hang(data, tmp_path, monkeypatch):
    beats = []
    monkeypatch.setattr(app.HangWatchdog, "beat", lambda self, step: beats.append(step))
    train(data, tmp_path / "beats", **harness(data, steps=3))
    assert beats[:3] == [0, 1, 2] and len(beats) > 4 and set(beats[3:]) == {3}


def test_a_sharded_run_evaluates_what_it_saved(data, tmp_path, quick_python):
    options = {**SMALL, **harness(data, steps=3), "distributed.fsdp_type": "full_shard"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "apps.LT2.train", *tiny_run.command_line(data, tmp_path / "two", options)]
    done = quick_python.run(*command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = scores_by_step(tmp_path / "two")
    assert scores_of(tmp_path / "two", 3, data, tmp_path / "again") == found[3]


def test_an_interrupted_evaluation_is_repeated(data, run, tmp_path, monkeypatch):
    inner = app.Evaluator.run_harness

    def leave_inside(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGUSR2)
        inner(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(app.Evaluator, "run_harness", leave_inside)
        dump_dir = train(data, tmp_path / "cut", **harness(data))
    assert not (dump_dir / "metrics.eval.jsonl").exists()
    assert checkpoint(dump_dir, 3).exists() and not checkpoint(dump_dir, 4).exists()
    train(data, dump_dir, **harness(data))
    assert scores_by_step(dump_dir) == scores_by_step(run)
    assert_same_run(dump_dir, run, 6)


def test_an_interrupted_evaluation_of_the_last_step_is_repeated(
    data, run, tmp_path, monkeypatch, capfd
):
    alone = {"eval.validation": None, "checkpoint.eval.every": 0}
    inner = app.Evaluator.run_harness

    def leave_inside(self, step):
        if step == 6:
            signal.raise_signal(signal.SIGUSR2)
        inner(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(app.Evaluator, "run_harness", leave_inside)
        dump_dir = train(data, tmp_path / "cut", **harness(data, **alone))
    assert checkpoint(dump_dir, 6).exists()
    train(data, dump_dir, **harness(data, **alone))
    assert scores_by_step(dump_dir)[6] == scores_by_step(run)[6]
    assert "nothing to do" not in capfd.readouterr().out
    train(data, dump_dir, **harness(data, **alone))
    assert "nothing to do" in capfd.readouterr().out


def test_a_failed_evaluation_does_not_end_the_run(data, run, tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise UserError("the data has gone")

    monkeypatch.setattr("apps.LT2.training.evaluation.evaluate", fail)
    dump_dir = train(data, tmp_path / "broken", **harness(data))
    assert_same_run(dump_dir, run, 6)
    errors = capfd.readouterr().err
    assert "the evaluation of step 3 failed" in errors and "the data has gone" in errors


TASK_MISTAKES = [
    ("lt2_local_perplexity", {"metadata": "{folder: /nowhere}"}),
    ("lt2_local_copy", {"gen_kwargs": "{repetition_penalty: 1.1}"}),
    ("lt2_local_copy", {"tasks": "[lt2_local_perplexity, {task: lt2_local_copy, few: 1}]"}),
    ("lt2_local_perplexity", {"num_fewshot": 1000}),
    ("apply_chat_template", {"apply_chat_template": True}),
    ("stride", {"stride": 33}),
]


@pytest.mark.parametrize("named, options", TASK_MISTAKES)
def test_tasks_are_checked_before_training(data, tmp_path, named, options):
    options = {f"eval.harness.{name}": value for name, value in options.items()}
    with pytest.raises(UserError, match=rf"^eval\.harness\..*{named}"):
        train(data, tmp_path / "r", **harness(data, **options))
    assert not (tmp_path / "r").exists()


def test_validation_can_be_null(data, tmp_path):
    dump_dir = train(data, tmp_path / "r", **{"eval.validation": None, "steps": 3})
    assert "loss/val" not in (dump_dir / "metrics.jsonl").read_text()


# ---- jobs


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Fake SLURM programs that log the submitted script, and SLURM and torchrun variables."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "sbatch.log"
    programs = {
        "sbatch": f'echo "$1 ${{SLURM_JOB_ID-no}} ${{RANK-no}}" >>{log}\n'
        'echo "Submitted batch job 5"; exit ${FAIL-0}',
        "srun": "",
        "sinfo": "echo 60",
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def test_a_job_for_each_evaluation(data, tmp_path, sbatch, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_PARTITION", "fast")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    dump_dir = tmp_path / "r"
    (dump_dir / "evals" / "0000000003").mkdir(parents=True)  # the folder may exist
    train(data, dump_dir, **harness(data), async_eval_gpus=1)
    assert not (dump_dir / "metrics.eval.jsonl").exists()
    lines = sbatch.read_text().splitlines()
    assert len(lines) == 2
    for line, step in zip(lines, (3, 6), strict=True):
        folder = dump_dir / "evals" / f"{step:010d}"
        script, *variables = line.split()
        assert Path(script).is_relative_to(folder) and variables == ["no", "no"]
        (submitted,) = folder.glob("submitit/*_submission.sh")
        text = submitted.read_text()
        for option in ("partition=fast", "gres=gpu:1", "nodes=1", "time=60"):
            assert f"#SBATCH --{option}\n" in text
        assert "-m apps.LT2.eval config=" in (folder / "submit.slurm").read_text()


def test_a_job_on_this_machine_gives_the_same_scores(
    data, run, tmp_path, monkeypatch, quick_python
):
    monkeypatch.setattr(sys, "executable", quick_python.executable)  # the job's python
    dump_dir = tmp_path / "r"
    train(data, dump_dir, **harness(data), async_eval_gpus=1, **{"checkpoint.eval.every": 6})
    folder = dump_dir / "evals" / "0000000006"
    until = time.monotonic() + 240
    while not (dump_dir / "metrics.eval.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.2)
    logs = [file.read_text() for file in (folder / "logs").rglob("run.err")]
    assert scores_by_step(dump_dir) == {6: scores_by_step(run)[6]}, logs


class FailedJob:
    paths = SimpleNamespace(stderr="job.err")

    def done(self):
        return True

    def exception(self):
        return RuntimeError("out of memory")


def test_a_failed_job_is_logged_with_the_next(data, tmp_path, monkeypatch, capfd):
    name = "apps.LT2.training.evaluation.launch_in_background"
    monkeypatch.setattr(name, lambda args, gpus: FailedJob())
    train(data, tmp_path / "r", **harness(data), async_eval_gpus=1)
    assert "the evaluation job of step 3 failed: see job.err" in capfd.readouterr().err


def test_jobs_on_this_machine_use_free_gpus(monkeypatch):
    monkeypatch.setattr("apps.LT2.training.args.visible_gpus", lambda: ["0", "2", "4", "6"])
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert find_free_gpus(2) == "4,6" and find_free_gpus(1) == "4"
    with pytest.raises(UserError, match="async_eval_gpus=3"):
        find_free_gpus(3)
    # srun instead of torchrun: six processes on two nodes
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    for name, value in {"JOB_ID": 1, "PROCID": 0, "LOCALID": 0, "NTASKS": 6, "NNODES": 2}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert find_free_gpus(1) == "6"


def test_a_failed_submission_does_not_end_the_run(data, tmp_path, sbatch, monkeypatch, capfd):
    monkeypatch.setenv("FAIL", "1")
    train(data, tmp_path / "r", **harness(data), async_eval_gpus=1)
    assert "the evaluation of step 6 failed" in capfd.readouterr().err


@pytest.mark.parametrize(
    "n_gpus, nodes", [(1, 1), (5, 1), (8, 1), (9, 3), (12, 2), (16, 2), (11, 11)]
)
def test_few_nodes_share_the_gpus_evenly(n_gpus, nodes):
    assert count_nodes(n_gpus) == nodes and n_gpus % nodes == 0 and n_gpus // nodes <= 8


# ---- mistakes

MISTAKES = {
    "eval.ckpt_dir=x": {"eval.ckpt_dir": "x"},
    "eval.global_step=4": {"eval.global_step": 4},
    "eval.wandb .*logging.wandb": {"eval.wandb.project": "x"},
    "async_eval_gpus=0 must be at least 1": {"async_eval_gpus": 0},
    "unknown option eval.harness.taks": {"eval.harness.taks": "[a]"},
    "unknown option eval.generator.temprature": {"eval.generator.temprature": 1},
    "eval.harness.tasks is empty": {"eval.harness.limit": 3},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_eval_is_a_user_error_at_the_start(data, tmp_path, message):
    with pytest.raises(UserError, match=message):
        validate_train_args(train_args(data, tmp_path / "run", **MISTAKES[message]))
    assert not (tmp_path / "run").exists()


def test_jobs_in_slurm_need_submitit(data, tmp_path, sbatch, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"async_eval_gpus=8 needs the package submitit.*\[slurm"):
        validate_train_args(train_args(data, tmp_path, **harness(data), async_eval_gpus=8))
