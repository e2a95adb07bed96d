"""The folder of a run: when a launch uses it, renames it, or refuses it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import apps.LT2.eval as evaluation
import apps.LT2.train as training
import lingua.slurm.plan as run_plan
from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.training.args import TrainArgs
from lingua.checkpoint import CheckpointArgs
from lingua.dataloader.args import DataArgs
from lingua.errors import UserError
from lingua.stool import launch_job
from tests.lingua.stool_utils import files_below, held, without_root_powers

REPOSITORY = Path(__file__).parents[3]


def test_a_dump_dir_that_exists_is_used_or_renamed_only_on_request(project, args):
    dump_dir = project / "runs" / "a b"
    launch_job(args)
    (dump_dir / "metrics.jsonl").write_text("kept")
    with pytest.raises(UserError, match="dump_dir=.* exists"):
        launch_job(args)
    launch_job(replace(args, dirs_exists_ok=True))
    assert (dump_dir / "metrics.jsonl").read_text() == "kept"
    for n in (1, 2):
        launch_job(replace(args, override=True))
        assert not (dump_dir / "metrics.jsonl").exists()
        assert (project / "runs" / f"a b.old-{n}" / "base_config.yaml").exists()
    assert (project / "runs" / "a b.old-1" / "metrics.jsonl").read_text() == "kept"


@pytest.mark.parametrize("option", ["override", "dirs_exists_ok"])
def test_a_running_run_keeps_its_folder(project, args, option):
    dump_dir = project / "runs" / "a b"
    launch_job(args)
    (dump_dir / "weights").write_text("kept")
    (dump_dir / "code" / "edited").write_text("kept")
    (project / "linked").symlink_to(dump_dir)
    again = replace(args, **{option: True})
    with held(dump_dir) as pid:
        for name in ("runs/a b", "linked"):
            with pytest.raises(UserError, match=rf"dump_dir=.*{name}: .*process {pid} on "):
                launch_job(replace(again, overrides=[f"dump_dir={name}"]))
        assert (dump_dir / "weights").exists() and (dump_dir / "code" / "edited").exists()
    launch_job(again)  # the holder was killed; its lock file is still there
    assert (dump_dir / "weights").exists() == (option == "dirs_exists_ok")
    assert not (dump_dir / "code" / "edited").exists()


def test_of_two_stools_at_once_one_gets_the_folder(project, args):
    job = run_plan.plan_run(args)
    launch_job(replace(args, overrides=["steps=5"]))
    with pytest.raises(UserError, match="dump_dir=.* exists"):
        run_plan.write_run(job)
    dump_dir = project / "runs" / "a b"
    assert "steps=5" in (dump_dir / "submit.slurm").read_text()
    with held(dump_dir), pytest.raises(UserError, match="another run writes there"):
        run_plan.write_run(replace(job, args=replace(args, override=True)))
    assert "steps=5" in (dump_dir / "submit.slurm").read_text()


ALLOWED = """
import sys
from pathlib import Path
from lingua.slurm.code import snapshot_code
from lingua.errors import UserError
from lingua.files.lock import lock_folders

root, run = map(Path, sys.argv[1:])
for attempt in (
    lambda: lock_folders({"dump_dir": run}).__enter__(),
    lambda: snapshot_code(root, run / "code", without=run),
):
    try:
        print("done", attempt())
    except (UserError, OSError) as error:
        print(error)
"""


@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_files_that_cannot_be_read_or_written_are_not_lost(tmp_path, mode):
    root, run = tmp_path / "project", tmp_path / "run"
    for folder in (root, run / "code" / "package"):
        folder.mkdir(parents=True)
    (run / "submit.slurm").write_text("")
    (run / "code" / "package" / "old.py").write_text("")
    (root / "new.py").write_text("")
    closed = [run / "code" / "package", run / "code", run / ".lock"]
    (run / ".lock").write_text("")
    if mode == 0:
        closed.append(root / "new.py")
    try:
        for path in closed:
            path.chmod(mode & (0o777 if path.is_dir() else 0o444))
        done = subprocess.run(
            [sys.executable, "-c", ALLOWED, str(root), str(run)],
            preexec_fn=without_root_powers,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        code = run / "code" if mode == 0 else run / ".code.old"
        for path in (code, code / "package"):
            path.chmod(0o755)
        assert (code / "package" / "old.py").exists()
    finally:
        for path in (path for path in closed if path.exists()):
            path.chmod(0o755)
    hold, copy = done.stdout.splitlines()
    assert hold.startswith(f"dump_dir={run}: cannot write there (Permission denied)")
    if mode == 0:
        assert "Permission denied" in copy
    else:
        assert copy == "done 1" and files_below(run / "code") == {"new.py"}


def test_override_leaves_the_inputs_of_the_run_in_place(project, args, monkeypatch):
    launch_job(args)
    run = project / "runs" / "a b"
    (run / "corpus").mkdir()
    (run / "env" / "bin").mkdir(parents=True)
    (run / "env" / "bin" / "python").symlink_to(sys.executable)
    (run / "own.yaml").write_text("dump_dir: runs/a b\n")
    (project / "linked").symlink_to(run / "corpus")
    (project / "beside").mkdir()
    (run / "leads out").symlink_to(project / "beside")
    again = replace(args, override=True)
    corpora = ("runs/a b/corpus", "linked", str(run), "runs/a b/leads out")
    cases = [("corpus", replace(again, overrides=[f"corpus={corpus}"])) for corpus in corpora]
    cases += [
        ("anaconda", replace(again, anaconda=str(run / "env"))),
        ("config", replace(again, config=str(run / "own.yaml"))),
        ("script", replace(again, overrides=["dump_dir=."])),
        ("script", replace(again, overrides=["dump_dir=.."])),
    ]
    for option, asked in cases:
        with pytest.raises(UserError, match=f"override=true dump_dir=.*contains {option}="):
            launch_job(asked)
    monkeypatch.chdir(run / "corpus")  # where the job would run
    config = str(project / str(again.config))
    with pytest.raises(UserError, match=r"override=true dump_dir=.*contains workdir="):
        launch_job(replace(again, config=config, overrides=[f"dump_dir={run}"]))
    monkeypatch.chdir(project)
    assert (run / "corpus").is_dir() and not (project / "runs" / "a b.old-1").exists()
    launch_job(replace(again, overrides=["corpus=beside"]))
    assert (project / "runs" / "a b.old-1" / "corpus").is_dir()


def test_the_scripts_of_this_repository_name_their_inputs(tmp_path):
    data, checkpoint = DataArgs("data", {"text": 1.0}), CheckpointArgs(init_ckpt_path="runs/a")
    inputs = training.input_paths(TrainArgs(data=data, checkpoint=checkpoint))
    assert inputs["checkpoint.init_ckpt_path"] == "runs/a"
    assert inputs["data.sources.text"] == Path("data/text") and inputs["data.root_dir"] is None
    inputs = training.input_paths(TrainArgs(data=DataArgs("data")))
    assert inputs["data.root_dir"] == "data"
    assert evaluation.input_paths(EvalArgs(ckpt_dir="runs/a"))["ckpt_dir"] == "runs/a"
