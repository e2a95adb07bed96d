"""The folder of a run: what a launch may write there and delete, and what it may not."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import lingua.slurm.plan as run_plan
from lingua.errors import UserError
from lingua.files.lock import Holder
from lingua.stool import launch_job
from tests.lingua.stool_utils import files_below, held, without_root_powers

REPOSITORY = Path(__file__).parents[3]


def test_a_dump_dir_that_exists_is_only_used_when_told_so(project, args):
    dump_dir = project / "runs" / "a b"
    launch_job(args)
    (dump_dir / "metrics.jsonl").write_text("kept")
    with pytest.raises(UserError, match="exists"):
        launch_job(args)
    launch_job(replace(args, dirs_exists_ok=True))
    assert (dump_dir / "metrics.jsonl").read_text() == "kept"
    # the config may lie in the folder that is deleted
    launch_job(replace(args, override=True, config=str(dump_dir / "base_config.yaml")))
    assert not (dump_dir / "metrics.jsonl").exists()
    assert (dump_dir / "base_config.yaml").read_text() == (project / "run.yaml").read_text()


@pytest.mark.parametrize(
    "option, held_below", [("override", ""), ("override", "checkpoints"), ("dirs_exists_ok", "")]
)
def test_a_run_that_goes_on_keeps_its_folder(project, args, option, held_below):
    dump_dir = project / "runs" / "a b"
    launch_job(args)
    (dump_dir / "checkpoints").mkdir()
    (dump_dir / "checkpoints" / "weights").write_text("kept")
    (dump_dir / "code" / "edited").write_text("kept")
    (project / "linked").symlink_to(dump_dir)
    again = replace(args, **{option: True})
    with held(dump_dir / held_below) as pid:
        for name in ("runs/a b", "linked"):
            said = rf"{option}=true dump_dir=.*{name}: a run writes to .*process {pid} on .*wait"
            with pytest.raises(UserError, match=said):
                launch_job(replace(again, overrides=[f"dump_dir={name}"]))
        assert (dump_dir / "checkpoints" / "weights").exists()
        assert (dump_dir / "code" / "edited").exists()
    launch_job(replace(again, overrides=["dump_dir=linked"]))  # by its id, the lock is left over
    assert (dump_dir / "checkpoints" / "weights").exists() == (option == "dirs_exists_ok")
    assert (project / "linked").is_symlink() and not (dump_dir / "code" / "edited").exists()


def test_what_may_be_in_use_is_not_deleted(project, args, monkeypatch):
    launch_job(args)
    dump_dir = project / "runs" / "a b"
    (dump_dir / ".lock").write_text("process 1 on elsewhere\n")
    unknown = Holder(dump_dir, "process 1 on elsewhere", is_certain=False)
    monkeypatch.setattr(run_plan, "find_holder", lambda _: unknown)
    with pytest.raises(UserError, match="no telling whether a run still writes .*on elsewhere"):
        launch_job(replace(args, override=True))
    assert (dump_dir / "submit.slurm").exists()
    launch_job(replace(args, dirs_exists_ok=True))  # as a run goes on itself in such a folder


def test_of_two_stools_at_once_one_gets_the_folder(project, args, monkeypatch):
    plan = run_plan.plan_run(args)
    launch_job(replace(args, overrides=["steps=5"]))  # faster, if later
    with pytest.raises(UserError, match="dump_dir=.*: exists; name another"):
        run_plan.write_run(plan)
    dump_dir = project / "runs" / "a b"
    assert "steps=5" in (dump_dir / "submit.slurm").read_text()
    with held(dump_dir), pytest.raises(UserError, match="another run writes there"):
        run_plan.write_run(replace(plan, job=replace(plan.job, args=replace(args, override=True))))
    assert "steps=5" in (dump_dir / "submit.slurm").read_text()


def test_a_deletion_that_was_cut_off_can_be_asked_for_again(project, args, monkeypatch):
    launch_job(args)
    dump_dir = project / "runs" / "a b"
    with monkeypatch.context() as full, pytest.raises(UserError, match="code cannot be deleted"):

        def rmtree(path):
            raise OSError(errno.EBUSY, "busy", str(path))

        full.setattr(run_plan.shutil, "rmtree", rmtree)
        launch_job(replace(args, override=True))
    launch_job(replace(args, override=True))
    assert (dump_dir / "code").is_dir()


ALLOWED = """
import sys
from pathlib import Path
from lingua.slurm.code import snapshot_code
from lingua.errors import UserError
from lingua.files.lock import hold_folders
from lingua.slurm.plan import check_may_delete

root, run = map(Path, sys.argv[1:])
for attempt in (
    lambda: check_may_delete(run, []),
    lambda: hold_folders({"dump_dir": run}).__enter__(),
    lambda: snapshot_code(root, run / "code", without=run),
):
    try:
        print("done", attempt())
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_what_may_not_be_read_or_written_is_one_line_and_nothing_is_lost(tmp_path, mode):
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
    delete, hold, copy = done.stdout.splitlines()
    assert delete.endswith(f"{run}/code may not be written, and so not be deleted")
    assert hold.startswith(f"dump_dir={run}: cannot write there (Permission denied)")
    if mode == 0:
        assert copy.startswith(f"{root}/new.py: may not be read, and is part of the code")
    else:
        assert copy == "done 1" and files_below(run / "code") == {"new.py"}


@pytest.mark.parametrize("folder", [".", "..", "data"])
def test_override_deletes_nothing_but_a_run(project, args, folder):
    (project / "data").mkdir()
    (project / "data" / "mine.txt").write_text("")
    (project / "config.yaml").write_text("")  # as a run has it
    with pytest.raises(UserError, match="override"):
        launch_job(replace(args, override=True, overrides=[f"dump_dir={folder}"]))
    assert (project / "data" / "mine.txt").exists() and (project / "run.yaml").exists()


def test_override_deletes_nothing_that_the_run_reads(project, args):
    launch_job(args)
    run = project / "runs" / "a b"
    (run / "corpus").mkdir()
    (project / "linked").symlink_to(run / "corpus")
    (project / "beside").mkdir()
    (run / "leads out").symlink_to(project / "beside")
    again = replace(args, override=True)
    plan = run_plan.plan_run(replace(again, overrides=["corpus=later"]))
    (project / "later").symlink_to(run / "corpus")
    with pytest.raises(UserError, match="would delete what corpus reads"):
        run_plan.write_run(plan)
    for corpus in ("runs/a b/corpus", "linked", str(run), "runs/a b/leads out"):
        for dump_dir in ("runs/a b", "runs/../runs/a b"):
            overrides = [f"corpus={corpus}", f"dump_dir={dump_dir}"]
            with pytest.raises(UserError, match="would delete what corpus reads"):
                launch_job(replace(again, overrides=overrides))
        assert (run / "corpus").exists() and (run / "leads out").exists()
    # a name is none of a file, and a corpus beside the run stays
    (project / "loop").symlink_to("loop")
    launch_job(replace(again, overrides=["corpus=loop"]))
    (run / "corpus").mkdir()
    launch_job(replace(again, overrides=["name=runs/a b/corpus", "corpus=beside"]))
    assert (project / "beside").exists() and not (run / "corpus").exists()


def test_override_deletes_neither_code_nor_environment_nor_repository(project, args):
    launch_job(args)
    run, marks = project / "runs" / "a b", ("base_config.yaml", "submit.slurm")
    (run / "env" / "bin").mkdir(parents=True)
    (run / "env" / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(UserError, match="would delete what anaconda reads"):
        launch_job(replace(args, override=True, anaconda=str(run / "env")))
    assert (run / "env").exists()

    for mark in marks:
        shutil.copy(run / mark, project / "project" / mark)
    with pytest.raises(UserError, match="would delete what script reads"):
        launch_job(replace(args, override=True, overrides=["dump_dir=project"]))
    assert list((project / "project").glob("*/train.py"))

    (project / "env link").symlink_to(run / "env")
    with pytest.raises(UserError, match="would delete what anaconda reads"):
        launch_job(replace(args, override=True, anaconda="env link"))

    (run / "thesis" / ".git").mkdir(parents=True)
    with pytest.raises(UserError, match="thesis is a git repository"):
        launch_job(replace(args, override=True))
    shutil.rmtree(run / "thesis")
    (run / "tuned" / "checkpoints").mkdir(parents=True)
    shutil.copy(run / marks[0], run / "tuned")
    with pytest.raises(UserError, match="tuned is another run"):
        launch_job(replace(args, override=True))
