"""Sweeps on this machine and, with submitit, on a cluster of shell scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import lingua.slurm.background as background
from lingua.args import parse_args
from lingua.errors import UserError
from lingua.stool import StoolArgs, launch_job, main
from lingua.sweep import as_arguments, combinations, format_table, label_of
from lingua.sweep import main as print_table
from tests.lingua.stool_utils import HOLD, held, json_lines
from tests.LT2.tiny_run import OPTIONS, SMALL, write_corpus

pytest.importorskip("submitit")


def folders(sweep: Path) -> list[str]:
    return sorted(path.name for path in sweep.iterdir() if (path / "submit.slurm").exists())


def seen(run: Path) -> list[dict]:
    return json_lines((run / "logs" / "local" / "run.out").read_text())


# ---- which runs


def test_every_combination_is_a_run():
    runs = combinations({"optim.lr": [1e-4, 3e-4], "model.loop_count": [1, 4]})
    assert list(runs) == [
        "lr=0.0001,loop_count=1",
        "lr=0.0001,loop_count=4",
        "lr=0.0003,loop_count=1",
        "lr=0.0003,loop_count=4",
    ]
    assert runs["lr=0.0003,loop_count=1"] == {"optim.lr": 3e-4, "model.loop_count": 1}


def test_different_options_have_different_folders():
    values = [
        "4:1",
        "4 1",
        "4/1",
        "a/../../b",
        "w" * 300,
        "w" * 301,
        "128->full",
        None,
        True,
        [1, 2],
        "字" * 120,
    ]
    labels = [label_of({"model.attention_pattern": value}) for value in values]
    assert len(set(labels)) == len(values)
    assert all(re.fullmatch(r"[\w.,=+-]{1,200}", label) for label in labels), labels
    assert all(len(os.fsencode(label)) < 256 for label in labels)
    # options with the same last name use their full names
    assert label_of({"a.every": 1, "b.every": 2}) == "a.every=1,b.every=2"


@dataclass
class Options:
    words: list[str] = field(default_factory=list)
    word: str | None = "a"
    anything: Any = None
    shares: dict[str, float] = field(default_factory=dict)


@pytest.mark.parametrize(
    "option, value",
    [
        ("words", ["a, b", "c: d", "", "null", "[x", "it's"]),
        ("words", ["字"]),
        ("word", "null"),
        ("word", "~"),
        ("word", ""),
        ("word", '"quoted"'),
        ("word", "4:1 -> full"),
        ("word", "[a, b]"),
        ("word", None),
        ("anything", "1e-4"),
        ("anything", 1e-4),
        ("anything", {"a": ["1", 2]}),
        ("shares", {"a, b": 1.0}),
    ],
)
def test_a_run_gets_the_values_of_the_sweep(option, value):
    assert getattr(parse_args(Options, as_arguments({option: value})), option) == value


def test_the_command_line_sets_options_and_values():
    args = parse_args(StoolArgs, ["sweep.optim.lr=[1e-4, 3e-4]", "sweep.name=[a]", "array=2"])
    assert args.sweep == {"optim.lr": [1e-4, 3e-4], "name": ["a"]} and args.array == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sweep={"dump_dir": ["a"]}), "sweep.dump_dir"),
        (dict(sweep={"steps": []}), r"sweep.steps=\[\]"),
        (dict(sweep={"steps": [2, 3, 2]}), "sweep repeats .*steps=2"),
        (dict(sweep={"stepss": [2]}), "unknown option stepss"),
        (dict(sweep={"optim.lr": [0.1, "high"]}), "optim.lr"),
        (dict(sweep={"steps": [2]}, ngpu=65), "65 processes are too many"),
        (dict(sweep={"steps": [2]}, nodes=-1, launcher="sbatch"), "nodes=-1"),
        (dict(sweep={"steps": [2]}, launcher="sbatch"), "no sbatch"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    project, args, monkeypatch, change, message
):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=message):
        launch_job(replace(args, **change))
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    "change, option",
    [
        (dict(array=0, sweep={"steps": [1]}), "array=0"),
        (dict(array=2), "array=2"),
        (dict(by="ffn", sweep={"steps": [1]}), "match"),
        (dict(sweep={"steps": 2}), "sweep.steps=2"),
        (dict(sweep={"steps": {"a": 1}}), "sweep.steps="),
    ],
)
def test_array_and_values_are_checked(change, option):
    with pytest.raises(UserError, match=option):
        StoolArgs(**change)


def test_only_slurm_needs_submitit(project, args, slurm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    swept = replace(args, sweep={"steps": [2]})
    with pytest.raises(UserError, match=r"a sweep needs the package submitit.*\[slurm\]"):
        launch_job(replace(swept, launcher="sbatch"))
    assert not (project / "runs").exists()
    launch_job(swept)
    assert seen(project / "runs" / "a b" / "steps=2")


def test_runs_of_a_sweep_write_to_their_own_files(project, args):
    with pytest.raises(UserError, match="stdout=true"):
        launch_job(replace(args, sweep={"steps": [2]}, stdout=True))
    assert not (project / "runs").exists()


# ---- on this machine


def test_a_failed_run_does_not_stop_the_others(project, args, capfd):
    options = ["nodes=1", "ngpu=1", "launcher=bash", "array=3", "sweep.steps=[12,13,14]"]
    with pytest.raises(UserError, match=r"1 of 3 runs failed.* dirs_exists_ok=true$"):
        main(["config=run.yaml", f"script={args.script}", *options, "--", "optim.lr=0.5"])
    sweep = project / "runs" / "a b"
    assert folders(sweep) == ["steps=12", "steps=13", "steps=14"]
    for n, run in ((n, sweep / f"steps={n}") for n in (12, 13, 14)):
        (printed,) = seen(run)
        assert printed["args"]["steps"] == n and printed["args"]["optim"] == {"lr": 0.5}
        assert printed["args"]["name"] == f"try_steps={n}"
        assert printed["args"]["dump_dir"] == printed["dump"] == str(run)
        assert Path(printed["file"]).is_relative_to(run / "code")
        assert (run / "code").resolve() == sweep / "code", "one copy for all runs"
        assert not any("runs" in path.parts for path in (run / "code").relative_to(run).rglob("*"))
    table = capfd.readouterr().out.partition("─")
    assert table[0].split()[-2:] == ["steps", "status"]
    assert [line.split()[0] for line in table[2].splitlines()[1:4]] == ["12", "13", "14"]
    assert table[2].endswith("stool: failed: steps=13: no luck\n")

    # each run can be relaunched
    submit = sweep / "steps=12" / "submit.slurm"
    subprocess.run(["bash", str(submit)], check=True, cwd="/")
    assert len(seen(sweep / "steps=12")) == 2


def test_a_run_that_never_started_fails(project, args, monkeypatch, capfd):
    monkeypatch.setattr("lingua.slurm.background.run_command", lambda job: ["bash", "-c", "exit 4"])
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        launch_job(replace(args, sweep={"steps": [2]}))
    assert "failed: steps=2: ended with status 4" in capfd.readouterr().out


def test_a_sweep_can_be_added_to(project, args, capfd, monkeypatch):
    monkeypatch.setattr("lingua.stool.run_sweep_here", lambda *args: [])
    config = {"dump_dir": "runs/s", "optim": {"lr": 0.5}}
    swept = replace(args, config=config, sweep={"steps": [2]})
    launch_job(swept)
    with pytest.raises(UserError, match="exists"):
        launch_job(replace(swept, sweep={"steps": [2, 3]}))
    launch_job(replace(swept, sweep={"steps": [2, 3]}, dirs_exists_ok=True))
    assert folders(project / "runs" / "s") == ["steps=2", "steps=3"]
    assert list(json.loads((project / "runs/s/sweep.json").read_text())) == ["steps=2", "steps=3"]


def test_a_sweep_leaves_a_running_run_alone(project, args, monkeypatch):
    monkeypatch.setattr("lingua.stool.run_sweep_here", lambda *args: [])
    swept = replace(args, sweep={"steps": [2, 3]})
    launch_job(swept)
    sweep = project / "runs" / "a b"
    (sweep / "steps=2" / "mine").write_text("kept")
    with held(sweep / "steps=3") as pid:
        with pytest.raises(UserError, match=f"dump_dir=.*steps=3.*process {pid} on"):
            launch_job(replace(swept, override=True))
        assert (sweep / "steps=2" / "mine").exists()  # all checks come before the first rename
        launch_job(replace(args, sweep={"steps": [2]}, override=True))
        assert not (sweep / "steps=2" / "mine").exists()
    with held(sweep), pytest.raises(UserError, match="dump_dir=.*another run writes there"):
        launch_job(replace(args, sweep={"steps": [4]}))  # the sweep would write its record there


def test_a_sweep_here_locks_its_folder_until_it_ends(project, args, monkeypatch):
    def run(sweep, jobs, at_once):
        command = [sys.executable, "-c", HOLD, str(sweep.folder)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert "another run writes there" in second.stderr

    monkeypatch.setattr("lingua.stool.run_sweep_here", run)
    launch_job(replace(args, sweep={"steps": [2]}))


def test_a_dry_run_of_a_sweep_names_every_run(project, args, slurm, capfd):
    swept = replace(args, launcher="sbatch", sweep={"steps": [2, 3, 4]}, array=2)
    launch_job(replace(swept, dry_run=True))
    assert not (project / "runs").exists() and not (slurm / "sbatch.log").exists()
    out = capfd.readouterr().out
    sweep = project / "runs" / "a b"
    assert f"3 new folders in {sweep}: code/" in out
    assert all(f"\n    steps={n}\n" in out for n in (2, 3, 4))
    assert f"would write {sweep}/sweep.json" in out and "#SBATCH --job-name=try_steps=2" in out
    assert "would run these 3 as one SLURM job array, 2 at a time" in out
    assert out.endswith(f" bash '{sweep}/steps=2/submit.slurm'\n")
    with pytest.raises(UserError, match="unknown option stepss"):
        launch_job(replace(swept, sweep={"stepss": [2]}, dry_run=True))


def test_a_sweep_takes_no_more_gpus_than_it_has_runs(project, args, monkeypatch):
    places = []
    monkeypatch.setattr(
        "lingua.stool.run_sweep_here", lambda jobs, folder, at_once: places.append(at_once) or []
    )
    monkeypatch.setattr(background, "visible_gpus", lambda: ["0", "1"])
    launch_job(replace(args, sweep={"steps": [2, 3]}, array=8))
    assert places == [2]


@pytest.mark.slow
def test_a_run_trains_and_ends_in_a_table(tmp_path, monkeypatch, capfd, quick_python):
    monkeypatch.setattr(sys, "executable", quick_python.executable)  # the run's python
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    options = {**OPTIONS, **SMALL, "steps": 2}
    del options["optim.lr"]
    options |= {"data.root_dir": tmp_path, "data.sources.text": 1}
    (tmp_path / "tune.yaml").write_text("name: tune\ndump_dir: runs/tune\n")
    asked = ["config=tune.yaml", "launcher=bash", "copy_code=false", "sweep.optim.lr=[0.01]"]
    asked += ["--", *(f"{k}={'null' if v is None else v}" for k, v in options.items())]
    main(asked)
    out = capfd.readouterr().out
    print_table(["dump_dir=runs/tune"])
    assert out.endswith(capfd.readouterr().out)
    print_table(["runs/tune", "format=json"])
    (row,) = json.loads(capfd.readouterr().out)
    assert (row["optim.lr"], row["step"], row["status"]) == (0.01, 2, "finished")
    assert row["layout"] == "full" and row["parameters"] > 1000
    assert 4 < row["val"] < row["loss"] < 7
    assert f"loss {row['loss']:.4f}, val {row['val']:.4f}" in out
    assert (tmp_path / "runs/tune/lr=0.01/checkpoints" / f"{2:010d}").is_dir()
    main(["dirs_exists_ok=true", *asked])
    assert "nothing to do" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"optim.clip.*\(in the run lr=0.01\)$"):
        main(["dirs_exists_ok=true", *asked, "optim.clip=0.5"])


def test_a_record_that_cannot_be_read_is_one_line(project, args):
    sweep = project / "runs" / "a b"
    (sweep / "lr=1").mkdir(parents=True)
    (sweep / "lr=1" / "config.yaml").write_text("lr: 1")
    (sweep / "sweep.json").write_text('{"lr=1": {"op')
    with pytest.raises(UserError, match="sweep.json is not readable"):
        format_table(sweep)
    with pytest.raises(UserError, match="sweep.json is not readable"):
        launch_job(replace(args, sweep={"steps": [2]}))
    assert sorted(path.name for path in sweep.iterdir()) == ["lr=1", "sweep.json"]


# ---- in SLURM


def test_slurm_gets_one_array_with_one_task_per_run(project, args, slurm, capfd):
    log = slurm / "submissions"
    sbatch = slurm / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\ncp "$1" {log}\necho "Submitted batch job 7"\n')
    asked = replace(args, launcher="sbatch", nodes=2, ngpu=4, partition="gpu", account="lab")
    asked = replace(asked, sweep={"steps": [2, 3, 4]}, array=2, dependency="afterok:5")
    launch_job(asked)
    text = log.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.M))
    assert options["array"] == "0-2%2" and options["job-name"] == "try"
    assert options.pop("dependency") == "afterok:5"
    plain = (project / "runs/a b/steps=2/submit.slurm").read_text()
    of_one_run = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", plain, re.M))
    for option in of_one_run.keys() - {"job-name", "output", "error"}:
        assert options.pop(option) == of_one_run[option], option
    assert options.keys() == {"array", "job-name", "output", "error"}
    assert "job 7, 3 runs" in capfd.readouterr().out

    task = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    subprocess.run(["bash", str(log)], check=True, env={**os.environ, **task}, capture_output=True)
    (asked_srun,) = (slurm / "srun.log").read_text().splitlines()
    assert "-n 8 -N 2" in asked_srun and "steps=3" in asked_srun
    assert (project / "runs/a b/steps=3/logs/9").is_dir()


def test_a_refused_submission_is_one_line(project, args, slurm):
    sbatch = slurm / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2\nexit 3\n")
    with pytest.raises(UserError, match="invalid account"):
        launch_job(replace(args, launcher="sbatch", sweep={"steps": [2]}))


@pytest.mark.parametrize("missing, message", [("sinfo", "time=-1"), ("srun", "no sbatch or srun")])
def test_missing_parts_of_slurm_are_found_before_anything_is_written(
    project, args, slurm, missing, message
):
    (slurm / "bin" / missing).unlink()
    with pytest.raises(UserError, match=message):
        launch_job(replace(args, launcher="sbatch", sweep={"steps": [2]}))
    assert not (project / "runs").exists()
