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


def test_a_holder_is_found_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert find_holder(tmp_path) is None
    with held(tmp_path) as pid:
        found = find_holder(tmp_path)
        assert found is not None and found.startswith(f"process {pid} on ")
        assert found.endswith(", SLURM job 77")
    assert (tmp_path / LOCK_NAME).exists() and find_holder(tmp_path) is None


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    """As on a Lustre that is mounted without them."""

    def lockf(*_):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with own_folders({"dump_dir": tmp_path}, is_master=True):
        assert "dump_dir" in caplog.text and "no locks" in caplog.text
        assert find_holder(tmp_path) is None
