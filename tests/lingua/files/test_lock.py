"""A run's folders are usable from the start, and no other run's."""

from __future__ import annotations

import errno
import fcntl

import pytest

from lingua.errors import UserError
from lingua.files.lock import LOCK_NAME, find_holder, own_folders
from tests.lingua.stool_utils import held


def test_one_run_holds_a_folder_until_it_ends(tmp_path):
    with held(tmp_path) as pid:
        said = f"dump_dir={tmp_path}: another run writes there .process {pid} on"
        with (
            pytest.raises(UserError, match=said),
            own_folders({"dump_dir": tmp_path}, is_master=True),
        ):
            pass
        with own_folders({"dump_dir": tmp_path}, is_master=False):  # rank 1 of that run
            pass
    with own_folders(
        {"dump_dir": tmp_path, "checkpoint.path": tmp_path / "a" / "b"}, is_master=True
    ):
        assert (tmp_path / "a" / "b").is_dir()


def test_folders_that_cannot_be_written_are_refused_by_option(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        said = f"checkpoint.path={folder}: cannot write there"
        with (
            pytest.raises(UserError, match=said),
            own_folders({"checkpoint.path": folder}, is_master=True),
        ):
            pass


def test_a_holder_is_found_and_what_a_dead_one_left_is_none(tmp_path, monkeypatch):
    run, other = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    for folder in (run / "checkpoints", other):
        folder.mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with held(run / "checkpoints") as pid:
        found = find_holder(run)
        assert found is not None and found.folder == run / "checkpoints" and found.is_certain
        assert f"process {pid} on " in found.who and found.who.endswith(", SLURM job 77")
        assert find_holder(other) is None
    assert (run / "checkpoints" / LOCK_NAME).exists() and find_holder(run) is None


def test_without_locks_a_holder_is_not_certain(tmp_path, monkeypatch):
    """As on a Lustre that is mounted without them."""

    def lockf(*_):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with own_folders({"dump_dir": tmp_path}, is_master=True):
        found = find_holder(tmp_path)
        assert found is not None and not found.is_certain and "process" in found.who
