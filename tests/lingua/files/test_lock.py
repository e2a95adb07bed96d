"""Only one process writes to a run's folder at a time."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys

import pytest

from lingua.errors import UserError
from lingua.files.lock import LOCK_NAME, check_unlocked, make_and_lock_folders
from tests.lingua.stool_utils import held


def test_one_process_locks_a_folder_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    folders = {"dump_dir": tmp_path}
    with held(tmp_path) as pid:
        for is_locked in (
            lambda: make_and_lock_folders(folders, is_master=True).__enter__(),
            lambda: check_unlocked("dump_dir", tmp_path),
        ):
            match = f"dump_dir={tmp_path}: .*process {pid} on .*, SLURM job 77"
            with pytest.raises(UserError, match=match):
                is_locked()
        with make_and_lock_folders(folders, is_master=False):  # rank 1 of the same run
            pass
    assert (tmp_path / LOCK_NAME).exists()
    check_unlocked("dump_dir", tmp_path)
    folders["checkpoint.path"] = tmp_path / "a" / "b"
    with make_and_lock_folders(folders, is_master=True):
        assert (tmp_path / "a" / "b").is_dir()


def test_ranks_may_check_a_folder_at_the_same_time(tmp_path):
    check = (
        "import fcntl, sys; file = open(sys.argv[1], 'a+'); "
        "fcntl.lockf(file, fcntl.LOCK_SH); print('checks', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", check, str(tmp_path / LOCK_NAME)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"checks\n"
        check_unlocked("dump_dir", tmp_path)
        other.kill()


def test_folders_that_cannot_be_written_are_refused_by_option(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with (
            pytest.raises(UserError, match=f"checkpoint.path={folder}: cannot write there"),
            make_and_lock_folders({"checkpoint.path": folder}, is_master=True),
        ):
            pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    """Lustre can be mounted without locks."""

    def lockf(*_):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with make_and_lock_folders({"dump_dir": tmp_path}, is_master=True):
        assert str(tmp_path) in caplog.text and "no locks" in caplog.text
        check_unlocked("dump_dir", tmp_path)
