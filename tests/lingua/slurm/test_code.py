"""The copy of the code: its files and its recorded commit."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from lingua.slurm.code import link_code, list_code, snapshot_code, snapshot_for_all
from lingua.stool import launch_job
from tests.lingua.stool_utils import files_below, git


def test_the_copy_has_files_that_git_tracks_or_does_not_ignore(project, args, caplog):
    name = args.script.split(".")[1]
    (project / "new.md").write_text("not added yet")
    (project / "gone.py").write_text("")
    git(project, "add", "gone.py")
    (project / "gone.py").unlink()
    with open(project / "weights.bin", "wb") as f:
        f.truncate(17 * 2**20)
    launch_job(args)
    code = project / "runs" / "a b" / "code"
    want = {".gitignore", "run.yaml", "new.md"}
    want |= {f"project/{name}/train.py", f"project/{name}/helper.py"}
    assert files_below(code) == want
    assert "weights.bin" in caplog.text

    (project / "new.md").unlink()
    launch_job(replace(args, dirs_exists_ok=True))
    assert files_below(code) == want - {"new.md"}


CODE = {"new.py", "tool.sh", "kernels/a.cu", "configs/base_config.yaml", "configs/other.yaml"}
OTHERS = {
    "a run": ("exp/a/base_config.yaml", "exp/a/config.yaml", "exp/a/code/x.py", "exp/a/b/y.md"),
    "a job": ("exp/b/base_config.yaml", "exp/b/submit.slurm", "exp/b/code/x.py"),
    "a sweep": ("exp/c/sweep.json", "exp/c/code/x.py", "exp/c/submitit/1_submission.sh"),
    "a venv": ("venv/pyvenv.cfg", "venv/lib/x.py"),
    "a conda environment": ("conda/conda-meta/history", "conda/lib/x.py"),
    "text": ("text.jsonl", "corpus.txt", "table.csv", "a.parquet", "web/web.chunk.00.jsonl"),
    "tokens": ("tokens.bin", "tokens.npy", "data_2/text.chunk.00.jsonl.tokens/meta.json"),
    "weights": ("m.pt", "w.safetensors", "exported/params.json", "exported/consolidated.pth"),
    "checkpoints": ("ck/0000000001/.metadata", "ck/0000000001/__0_0.distcp", "ck/1/params.json"),
    "hidden": (".cache/x.py", ".code.tmp/x.py", "exp/.code.old/x.py"),
    "output": ("samples.json", "loss.png", "run.log", "evals/results.json"),
}


def write_all(root: Path, names) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x\n")


@pytest.mark.parametrize("kind", OTHERS)
def test_the_copy_holds_code_only(project, kind):
    before = {str(file) for file in list_code(project)}
    write_all(project, (*CODE, *OTHERS[kind]))
    (project / "large.py").write_bytes(b"#" * (2**20 + 1))
    assert {str(file) for file in list_code(project)} == before | CODE


def test_copies_of_runs_in_the_checkout_do_not_grow(project):
    sizes = []
    for i in range(3):
        run = project / "exp" / f"run{i}"
        write_all(run, ("base_config.yaml", "config.yaml", "metrics.jsonl"))
        sizes.append(snapshot_code(project, run / "code", without=run))
    assert len(set(sizes)) == 1


def test_runs_of_a_sweep_share_a_copy_until_the_code_changes(project):
    sweep = project / "sweep"
    runs = [sweep / name for name in ("a", "b", "c")]
    for run in runs:
        run.mkdir(parents=True)
    (runs[1] / "code").mkdir()  # of an earlier version
    (runs[1] / "code" / "old.py").touch()
    for run, name in zip(runs, ("code", "code", "code.2"), strict=True):
        if name == "code.2":
            write_all(project, ["new.py"])
        copy, n_files = snapshot_for_all(project, sweep)
        link_code(copy, run / "code")
        assert (run / "code").resolve() == copy == sweep / name
        assert n_files == len(files_below(copy))
    assert not (sweep / "code" / "new.py").exists()
    assert sorted(p.name for p in sweep.iterdir()) == ["a", "b", "c", "code", "code.2"]

    # one of the runs is launched again by itself
    snapshot_code(project, runs[0] / "code", without=runs[0])
    assert (runs[0] / "code").resolve() == runs[0] / "code"
    assert [p.name for p in runs[0].iterdir()] == ["code"]


def add_submodule(project: Path, tmp_path: Path) -> Path:
    """Add a repository with one file as the submodule `sub`."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "sub.py").write_text("")
    git(other, "init", "-q")
    git(other, "add", ".")
    git(other, "commit", "-qm", "one")
    git(project, "-c", "protocol.file.allow=always", "submodule", "-q", "add", str(other), "sub")
    return other


def test_submodules_and_linked_folders_are_copied(project, args, tmp_path, caplog):
    other = add_submodule(project, tmp_path)
    (project / "sub" / "new.py").write_text("not added yet")
    git(project, "clone", "-q", str(other), "clone")
    (project / "outside").symlink_to(other)
    (project / "inside").symlink_to(project / "project")
    git(project, "add", "outside", "inside")
    launch_job(args)
    code = project / "runs" / "a b" / "code"
    assert {"sub/sub.py", "sub/new.py"} <= files_below(code)
    assert (code / "outside").resolve() == other
    assert (code / "inside").resolve() == code / "project"
    assert not (code / "clone").exists() and "git repository clone/" in caplog.text


def test_a_submodule_that_is_not_checked_out_is_left_out(project, tmp_path):
    add_submodule(project, tmp_path)
    git(project, "commit", "-qm", "two")
    git(tmp_path, "clone", "-q", str(project), "clone")
    assert (tmp_path / "clone" / "sub").is_dir()
    assert not any(file.parts[0] == "sub" for file in list_code(tmp_path / "clone"))


def test_a_copy_that_fails_leaves_nothing(project, monkeypatch):
    (project / "runs").mkdir()

    def full(*_):
        raise OSError("full")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="full"):
        snapshot_code(project, project / "runs" / "code", project / "runs")
    assert not list((project / "runs").iterdir())


def test_without_git_python_and_yaml_files_are_copied(project, args):
    name = args.script.split(".")[1]
    subprocess.run(["rm", "-rf", ".git"], check=True)
    (project / "notes.txt").write_text("")
    (project / "env").mkdir()
    (project / "env" / "pyvenv.cfg").write_text("")
    (project / "env" / "lib.py").write_text("")
    launch_job(replace(args, overrides=["dump_dir=runs/before"]))
    launch_job(args)
    launch_job(replace(args, dirs_exists_ok=True))  # the copy leaves out the run
    dump_dir = project / "runs" / "a b"
    want = {"run.yaml", "secret.py", f"project/{name}/train.py", f"project/{name}/helper.py"}
    assert files_below(dump_dir / "code") == want
    version = json.loads((dump_dir / "code_version.json").read_text())
    assert version["commit"] is None


def test_the_commit_and_changes_are_recorded(project, args):
    path = project / "runs" / "a b" / "code_version.json"
    launch_job(args)
    head = git(project, "rev-parse", "HEAD").strip()
    assert json.loads(path.read_text()) == {"commit": head, "dirty": False, "root": str(project)}
    (project / "run.yaml").write_text((project / "run.yaml").read_text() + "# edited\n")
    launch_job(replace(args, dirs_exists_ok=True))
    assert json.loads(path.read_text())["dirty"] is True


def test_a_copy_that_cannot_be_renamed_leaves_the_older_one(tmp_path, monkeypatch):
    root, target = tmp_path / "root", tmp_path / "run" / "code"
    (root / "a").mkdir(parents=True)
    target.parent.mkdir()
    (root / "a" / "x.py").write_text("x = 1\n")
    snapshot_code(root, target, without=target.parent)
    rename = Path.rename

    def fails(self, to):
        if self.name == ".code.tmp":
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt):
        snapshot_code(root, target, without=target.parent)
    assert (target / "a" / "x.py").read_text() == "x = 1\n"
    assert [path.name for path in target.parent.iterdir()] == ["code"]
