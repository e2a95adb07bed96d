"""The runs in a folder, and the options that somebody chose differently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lingua.errors import UserError
from lingua.slurm.run_list import find_runs, read_differences, read_overrides
from lingua.slurm.script import render_submit
from lingua.sweep import format_table
from tests.lingua.test_stool import some_job

SCRIPT = """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Validation:
    max_steps: int | None = None
    sources: list[str] = field(default_factory=list)

@dataclass
class Eval:
    harness: str | None = None
    validation: Validation | None = field(default_factory=Validation)

@dataclass
class TrainArgs:
    dump_dir: str = ""
    steps: int = 100
    lr: float = 1e-3
    max_seqlen: int = 1024  # derived
    n_ranks: int = 1  # derived
    eval: Eval | None = None
"""
DEFAULTS = {"steps": 100, "lr": 1e-3, "max_seqlen": 1024, "n_ranks": 1, "eval": None}


@pytest.fixture
def script(tmp_path, monkeypatch) -> str:
    (tmp_path / "script_of_runs.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "script_of_runs"


def write(run: Path, **configs: Any) -> Path:
    """Write configs of a run, by name without the suffix."""
    run.mkdir(parents=True)
    for name, options in configs.items():
        (run / f"{name}.yaml").write_text(json.dumps(options))
    return run


def write_run(run: Path, *, ranks: int = 1, seqlen: int = 64, **asked: Any) -> Path:
    """Write the files of a run that was started without stool."""
    base = DEFAULTS | {"dump_dir": str(run)} | asked
    return write(run, base_config=base, config=base | {"max_seqlen": seqlen, "n_ranks": ranks})


def columns(folder: Path, script: str) -> list[str]:
    found = read_differences(folder, script).values()
    return list(dict.fromkeys(option for run in found for option in run))


def test_defaults_and_derived_values_have_no_column(tmp_path, script):
    runs = tmp_path / "runs"
    evaluated = {"harness": None, "validation": {"max_steps": 2, "sources": []}}
    write_run(runs / "a", ranks=2)
    write_run(runs / "b", seqlen=32, eval=evaluated)
    write_run(runs / "c")
    found = read_differences(runs, script)
    assert columns(runs, script) == ["run", "eval.validation.max_steps"]
    assert found["b"]["eval.validation.max_steps"] == 2
    write_run(runs / "d", eval={"harness": None, "validation": None}, lr=0.1)
    assert columns(runs, script) == ["run", "lr", "eval.validation.max_steps", "eval.validation"]


def test_options_of_a_run_by_stool_come_from_two_files(tmp_path, script):
    runs = tmp_path / "runs"
    write_run(runs / "a")
    whole = DEFAULTS | {"steps": 7, "lr": 0.5, "max_seqlen": 64, "n_ranks": 8}
    b = write(runs / "b", base_config={"steps": 7}, config=whole)
    job = replace(some_job(overrides=["lr=0.5", "eval=null"]), dump_dir=b)
    (b / "submit.slurm").write_text(render_submit(job))
    assert columns(runs, script) == ["run", "steps", "lr"]
    # a run that has not started shows its requested options
    c = write(runs / "c", base_config={"steps": 7})
    (c / "submit.slurm").write_text(render_submit(replace(job, dump_dir=c)))
    assert read_differences(runs, script)["c"] == {"run": "c", "steps": 7, "lr": 0.5}


def test_options_that_changed_on_resume_have_a_column(tmp_path, script):
    runs = tmp_path / "runs"
    write_run(runs / "a")
    b = write_run(runs / "b")
    started = json.loads((b / "config.yaml").read_text())
    for step, steps in ((100, 150), (20, 100)):
        (b / f"config.before_step_{step}.yaml").write_text(json.dumps(started | {"steps": steps}))
    (b / "config.yaml").write_text(json.dumps(started | {"steps": 200, "max_seqlen": 32}))
    assert columns(runs, script) == ["run", "steps"]
    assert read_differences(runs, script)["b"]["steps"] == 200


def test_overrides_are_read_from_submit_slurm(tmp_path):
    given = ["a.b=1e-4", "pattern=4:1 -> full", "sources={x: 1.0}", "word=it's\nelse\n$HOME"]
    (tmp_path / "submit.slurm").write_text(render_submit(some_job(overrides=given)))
    assert read_overrides(tmp_path / "submit.slurm") == {
        "a.b": 1e-4,
        "pattern": "4:1 -> full",
        "sources.x": 1.0,
        "word": "it's else $HOME",  # YAML folds lines
    }
    assert read_overrides(tmp_path / "absent") == {}


def test_runs_of_a_sweep_have_its_name_in_front(tmp_path, script):
    runs = tmp_path / "runs"
    write_run(runs / "a")
    for lr in (0.1, 0.2):
        write_run(runs / "tune" / f"lr={lr}", lr=lr)
    write(runs / "tune" / "submitit")
    write_run(runs / "no sweep" / "below")
    (runs / "tune" / "sweep.json").write_text("{}")
    assert find_runs(runs) == {name: runs / name for name in ("a", "tune/lr=0.1", "tune/lr=0.2")}
    (runs / "tune" / "lr=0.1" / "metrics.jsonl").write_text('{"global_step": 9}\n')
    _, *rows = [line.split()[:3] for line in format_table(runs, script).splitlines()]
    assert rows == [["a", "0.001", "-"], ["tune/lr=0.1", "0.1", "9"], ["tune/lr=0.2", "0.2", "-"]]


def test_a_script_without_options_is_refused(tmp_path):
    for lr in (0.1, 0.2):
        write(tmp_path / f"{lr}", config={"lr": lr, "only" if lr == 0.1 else "other": 1})
    with pytest.raises(UserError, match="script=lingua.errors has no TrainArgs"):
        read_differences(tmp_path, "lingua.errors")
