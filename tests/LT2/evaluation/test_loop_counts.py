"""One loaded model evaluated with several numbers of loops, by the command and in training."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.LT2.eval import launch_eval, launch_parts, resolve
from apps.LT2.evaluation import evaluate as evaluation
from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.training.args import check_eval_args
from apps.LT2.training.evaluation import as_one_job, eval_parts_of_step, missing_parts
from lingua.args import parse_args
from lingua.errors import UserError
from lingua.evaluations import read_evaluations
from tests.LT2.looped_models import make, prompt
from tests.LT2.tiny import save_run, tiny_model
from tests.LT2.tiny_run import SMALL, WORDS, checkpoint, clean_process, train, train_args
from tests.LT2.tiny_run import write_corpus as write_text

STEP = "0000000007"
DEVICE = "generator.device=cpu"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("data/local").mkdir(parents=True)
    text = json.dumps({"text": " ".join(random.Random(0).choices(WORDS, k=40))})
    Path("data/local/text.val.jsonl").write_text(text)
    data = {"tokenizer": {"name": "bytes"}, "root_dir": "data", "sources": {"local": 1.0}}
    for name, pattern in (("r", None), ("segments", "4->full")):
        model = tiny_model("full", 2, n_layers=1, max_seqlen=64, attention_pattern=pattern)
        save_run(tmp_path / name, model, 7, data={**data, "seq_len": 64})
    return tmp_path


def args(*options: str) -> EvalArgs:
    return parse_args(EvalArgs, [DEVICE, *options])


def test_each_number_of_loops_equals_an_evaluation_alone(here, monkeypatch, capsys):
    loads, load = [], evaluation.load_model
    monkeypatch.setattr(evaluation, "load_model", lambda args: loads.append(0) or load(args))
    with clean_process():
        scores = launch_parts(args("ckpt_dir=r", "loop_counts=[4, 1, 2, 1]"))
        table = capsys.readouterr().out
        assert len(loads) == 1
        commands = [args("ckpt_dir=r", f"loop_count={T}", "dump_dir=x") for T in (4, 1, 2)]
        alone = [launch_eval(command) for command in commands]
    assert scores == alone and len({s["validation"]["loss/val"] for s in scores}) == 3
    table = table[table.index("\nloops") + 1 :]
    head, _, *rows, note = table.splitlines()
    assert head.split() == ["loops", "1", "2*", "4"] and note == "* loops of training: 2"
    shown = [f"{scores[i]['validation']['loss/val']:.4g}" for i in (1, 2, 0)]
    assert rows[0].split() == ["loss/val", *shown] and max(map(len, rows)) <= 100

    lines = (here / "r" / "metrics.validation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["loops"], r["loss/val"]) for r in records] == [
        (T, s["validation"]["loss/val"]) for T, s in zip((4, 1, 2), scores, strict=True)
    ]
    flops = {r["loops"]: r["flops_per_token"] for r in records}
    assert 0 < flops[4] - flops[2] == 2 * (flops[2] - flops[1])
    folders = {path.name for path in (here / "r" / "evals").iterdir()}
    assert folders == {STEP, f"{STEP}-loop_count=1", f"{STEP}-loop_count=4"}
    found = {e.label: e for e in read_evaluations(here / "r")}
    assert found["loop_count=4"].flops_per_token == flops[4]
    assert found["loop_count=4"].scores == scores[0]["validation"]


def test_a_folder_of_the_user_keeps_each_number_apart(here):
    with clean_process():
        launch_parts(args("ckpt_dir=r", "loop_counts=[1, 2]", "dump_dir=mine/a"))
    files = sorted(str(path.parent) for path in Path("mine").rglob("validation.json"))
    assert files == ["mine/a", "mine/a-loop_count=1"]


def test_wandb_gets_one_run(here, monkeypatch):
    logged: list[Any] = []

    class Stub:
        def log(self, values, step):
            logged.append((values, step))

        def finish(self):
            logged.append("end")

    monkeypatch.setattr(evaluation, "start_wandb", lambda wandb, config, folder: Stub())
    with clean_process():
        launch_parts(args("ckpt_dir=r", "loop_counts=[1, 2]", "wandb={}"))
    (values, step), end = logged
    assert (step, end) == (7, "end")
    losses = {"validation/loop_count=1/loss/val", "validation/loss/val"}
    assert {name for name in values if name.endswith("loss/val")} == losses


@pytest.mark.parametrize(
    "options, named",
    [
        (["ckpt_dir=r", "loop_counts=[]"], r"loop_counts=\[\]"),
        (["ckpt_dir=r", "loop_counts=[1, 0]"], r"loop_counts=\[1, 0\]"),
        (["ckpt_dir=r", "loop_counts=[-1]"], r"loop_counts=\[-1\]"),
        (["ckpt_dir=r", "loop_counts=[2.5]"], "loop_counts.*2.5"),
        (["ckpt_dir=r", "loop_counts=[two]"], "loop_counts.*two"),
        (["ckpt_dir=r", "loop_counts=[1, 2]", "loop_count=2"], "loop_count=2 and loop_counts"),
        (["ckpt_dir=segments", "loop_counts=[1, 2, 3]"], r"loop_counts=\[1, 2, 3\].*2 segments"),
    ],
)
def test_mistakes_end_before_the_model_is_loaded(here, options, named):
    with pytest.raises(UserError, match=named):
        resolve(args(*options))


def test_loop_t_runs_segment_t():
    model, tokens = make(attention_pattern="3->full", loop_count=2), prompt(1, 9)
    first = make(attention_pattern="3", loop_count=1)
    first.load_state_dict(model.state_dict() | {"rho": model.state_dict()["rho"][:1]})
    model.set_loops(1)
    torch.testing.assert_close(model(tokens), first(tokens), rtol=0, atol=0)
    with pytest.raises(UserError, match="2 segments"):
        model.set_loops(3)


# ---- training


def test_validation_in_training(tmp_path):
    data = write_text(tmp_path / "data")
    options: dict[str, Any] = {
        **SMALL,
        "steps": 2,
        "checkpoint.dump.every": 1,
        "checkpoint.eval.every": 1,
    }
    counts: dict[str, Any] = {"eval.loop_counts": "[1, 4]"}
    run = train(data, tmp_path / "r", **options, **counts)
    plain = train(data, tmp_path / "plain", **options)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (first, last) = [r for r in records if "loss/val" in r]
    assert {k for k in last if k.startswith("loss/val/")} == {"loss/val/1", "loss/val/4"}
    with clean_process():
        parts = launch_parts(args(f"ckpt_dir={checkpoint(run, 2)}", "loop_counts=[1, 2, 4]"))
    keys = ("loss/val/1", "loss/val", "loss/val/4")
    for key, scores in zip(keys, parts, strict=True):
        assert last[key] == pytest.approx(scores["validation"]["loss/val"], rel=1e-6)
    without = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss/val"] for r in without if "loss/val" in r] == [
        first["loss/val"],
        last["loss/val"],
    ]
    losses = [[r["loss/out"] for r in rs if "loss/out" in r] for rs in (records, without)]
    assert losses[0] == losses[1]


def test_only_missing_numbers_of_loops_are_scored_after_a_stop(tmp_path):
    pytest.importorskip("lm_eval")
    options = {"eval.loop_counts": "[1, 2, 4]", "eval.harness.tasks": "[a]"}
    run = train_args(tmp_path / "data", tmp_path / "r", **SMALL, **options)
    run = replace(run, checkpoint=replace(run.checkpoint, path=str(tmp_path / "r/checkpoints")))
    parts = eval_parts_of_step(run, 6)
    assert missing_parts(run, 6) == parts
    (tmp_path / "r").mkdir()
    record = {"global_step": 6, **parts[1][1].record("results.json")}
    (tmp_path / "r" / "metrics.eval.jsonl").write_text(json.dumps(record) + "\n")
    missing = missing_parts(run, 6)
    assert missing == [parts[0], parts[2]]
    job = as_one_job(run, missing)
    assert job.loop_counts == [1, 4] and job.dump_dir == str(tmp_path / "r/evals/0000000006")


def test_numbers_that_the_pattern_of_a_run_does_not_allow(tmp_path):
    options = {**SMALL, "model.attention_pattern": "4->full", "eval.loop_counts": "[1, 3]"}
    with pytest.raises(UserError, match=r"eval.loop_counts=\[1, 3\].*2 segments"):
        check_eval_args(train_args(tmp_path, tmp_path / "r", **options), is_here=True)
