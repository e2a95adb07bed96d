"""find_checkpoint: what each option of a checkpoint accepts, and its one error."""

from __future__ import annotations

import shutil

import pytest

from lingua.checkpoint import consolidate_checkpoints, find_checkpoint
from lingua.errors import UserError
from tests.lingua.checkpointing.checkpoint_runs import CONFIG, build, manager_at


def save_run(folder, *steps, name="checkpoints"):
    manager, (model, optimizer, state) = manager_at(folder / name), build()
    for state.step in steps:
        manager.save(model, optimizer, state, CONFIG)
    (folder / "config.yaml").write_text(f"checkpoint: {{path: {folder / name}}}")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = save_run(tmp_path_factory.mktemp("runs") / "demo", 2, 10)
    consolidate_checkpoints(folder / "checkpoints/0000000010")
    return folder


@pytest.mark.parametrize(
    "path, found",
    [
        ("", "checkpoints/0000000010"),
        ("checkpoints", "checkpoints/0000000010"),
        ("checkpoints/0000000002", "checkpoints/0000000002"),
        (file := "checkpoints/0000000010/consolidated/consolidated.pth", file),
        ("checkpoints/0000000010/consolidated", file),
    ],
)
def test_a_run_a_step_and_a_file_are_found(run, path, found, monkeypatch):
    assert find_checkpoint(run / path) == run / found
    monkeypatch.chdir(run)
    assert find_checkpoint(path or ".").resolve() == run / found


def test_checkpoints_outside_the_run_are_found(tmp_path):
    run = save_run(tmp_path / "run", 4, name="../disk")
    assert find_checkpoint(run).resolve() == tmp_path / "disk/0000000004"
    moved = run.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "disk")
    with pytest.raises(UserError, match="this run has no complete checkpoint"):
        find_checkpoint(moved)


def test_the_newest_readable_checkpoint_of_a_run_counts(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints/0000000010/params.json").write_text("{")
    assert find_checkpoint(copy) == copy / "checkpoints/0000000002"
    (copy / "checkpoints/0000000002/params.json").write_text("{")
    with pytest.raises(UserError, match=f"^from={copy}: none of the 2 .* params.json differs"):
        find_checkpoint(copy, "from")


def test_a_misspelt_path_is_suggested(run):
    with pytest.raises(UserError, match=rf"no such file or folder.*; did you mean {run}\?"):
        find_checkpoint(run.with_name("dmo"))


def without_metadata(run, folder):
    shutil.copytree(run / "checkpoints/0000000002", folder / "0000000002")
    (folder / "0000000002/.metadata").unlink()


@pytest.mark.parametrize(
    "make, path, what",
    [
        (lambda run, folder: None, "", "path is empty"),
        (lambda run, folder: None, "nowhere", "no such file or folder"),
        (lambda run, folder: None, "quickstart", "this run has no complete checkpoint"),
        (lambda run, folder: None, ".", r"folder of runs \(quickstart\)"),
        (lambda run, folder: (folder / "empty").mkdir(), "empty", r"\(empty\)"),
        (without_metadata, "0000000002", ".metadata is missing"),
    ],
)
def test_a_path_without_checkpoint_is_described(run, make, path, what, tmp_path, monkeypatch):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart/config.yaml").write_text("checkpoint: null")
    make(run, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^ckpt={path}: .*{what}.*<run>/checkpoints/") as error:
        find_checkpoint(path)
    assert "\n" not in str(error.value)
