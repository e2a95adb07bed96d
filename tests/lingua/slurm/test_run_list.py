"""The runs in a folder, and the options that somebody chose differently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lingua.slurm.run_list import differing, find_runs, read_options, read_overrides
from lingua.slurm.script import render_submit
from tests.lingua.test_stool import some_job

DEFAULTS = {"steps": 100, "lr": 1e-3, "max_seqlen": 1024, "n_ranks": 1, "eval": None}


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


def columns(folder: Path) -> list[str]:
    return differing([read_options(run) for run in find_runs(folder).values()])


def test_derived_values_and_sections_of_some_runs_do_not_differ(tmp_path):
    evaluated = {"harness": None, "validation": {"max_steps": 2, "sources": []}}
    write_run(tmp_path / "a", ranks=2)
    write_run(tmp_path / "b", seqlen=32, eval=evaluated)
    write_run(tmp_path / "c", newer_option=1)
    assert columns(tmp_path) == []
    write_run(tmp_path / "d", lr=0.1, data={"sources": {"books": 1.0}})
    write_run(tmp_path / "e", eval={"harness": None, "validation": {"max_steps": 3}})
    assert columns(tmp_path) == ["lr", "eval.validation.max_steps", "data.sources.books"]


def test_options_of_a_run_by_stool_come_from_two_files(tmp_path):
    write_run(tmp_path / "a", ranks=2)
    whole = DEFAULTS | {"steps": 7, "lr": 0.5, "max_seqlen": 64, "n_ranks": 8, "new": 1, "clip": 2}
    b = write(tmp_path / "b", base_config={"steps": 7, "clip": 2}, config=whole)
    job = replace(some_job(overrides=["lr=0.5", "eval=null"]), dump_dir=b)
    (b / "submit.slurm").write_text(render_submit(job))
    assert columns(tmp_path) == ["steps", "lr", "clip"]
    # a run that has not started has its requested options
    c = write(tmp_path / "c", base_config={"steps": 8})
    (c / "submit.slurm").write_text(render_submit(replace(job, dump_dir=c)))
    assert read_options(c).current == {"steps": 8, "lr": 0.5, "eval": None}
    assert columns(tmp_path) == ["steps", "lr", "clip"]


def test_a_seed_that_sets_other_seeds_is_one_option(tmp_path):
    write(tmp_path / "a", base_config={"seed": 1}, config={"seed": 1, "model": {"seed": 1}})
    started = {"seed": 2, "model": {"seed": 2}}
    write(tmp_path / "b", base_config={"seed": 2, "model": {"seed": None}}, config=started)
    assert columns(tmp_path) == ["seed"]


def test_options_that_changed_on_resume_have_a_column(tmp_path):
    write_run(tmp_path / "a")
    b = write_run(tmp_path / "b")
    started = json.loads((b / "config.yaml").read_text())
    for step, steps in ((100, 150), (20, 100)):
        (b / f"config.before_step_{step}.yaml").write_text(json.dumps(started | {"steps": steps}))
    (b / "config.yaml").write_text(json.dumps(started | {"steps": 200, "max_seqlen": 32}))
    assert columns(tmp_path) == ["steps"]
    assert read_options(b).current["steps"] == 200


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


def test_runs_of_a_sweep_have_its_name_in_front(tmp_path):
    write_run(tmp_path / "a")
    for lr in (0.1, 0.2):
        write_run(tmp_path / "tune" / f"lr={lr}", lr=lr)
    write(tmp_path / "tune" / "submitit")
    write_run(tmp_path / "no sweep" / "below")
    (tmp_path / "tune" / "sweep.json").write_text("{}")
    names = ("a", "tune/lr=0.1", "tune/lr=0.2")
    assert find_runs(tmp_path) == {name: tmp_path / name for name in names}
