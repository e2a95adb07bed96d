"""A run's folders are usable from the start, and no other run's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lingua.errors import UserError
from lingua.run_folder import own_folders

HOLD = """
import sys, time
from lingua.run_folder import own_folders
with own_folders({"dump_dir": sys.argv[1]}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_run_holds_a_folder_until_it_ends(tmp_path, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        said = f"dump_dir={tmp_path}: another run writes there .process {process.pid} on"
        with pytest.raises(UserError, match=said), own_folders({"dump_dir": tmp_path}):
            pass
        with monkeypatch.context() as rank_1_of_that_run:
            for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
                rank_1_of_that_run.setenv(name, value)
            with own_folders({"dump_dir": tmp_path}):
                pass
    finally:
        process.kill()
        process.wait()
    with own_folders({"dump_dir": tmp_path, "checkpoint.path": tmp_path / "a" / "b"}):
        assert (tmp_path / "a" / "b").is_dir()


def test_folders_that_cannot_be_written_are_refused_by_option(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        said = f"checkpoint.path={folder}: cannot write there"
        with pytest.raises(UserError, match=said), own_folders({"checkpoint.path": folder}):
            pass
