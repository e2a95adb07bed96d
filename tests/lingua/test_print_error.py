"""Ranks that share an error tell it once, and no rank's own error is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import lingua.errors as errors
from lingua.errors import UserError, run_cli


@pytest.fixture
def fail(tmp_path, monkeypatch, capfd):
    """Let a rank of torchrun fail; what it prints."""
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # run_cli sets another

    def fail(rank: int, message: str, local_rank: int | None = None) -> str:
        local_rank = rank if local_rank is None else local_rank
        folder = tmp_path / "attempt_0" / str(local_rank)
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))

        def main(argv):
            raise UserError(message)

        with pytest.raises(SystemExit) as left:
            run_cli(main)
        assert left.value.code == 2
        return capfd.readouterr().err

    return fail


def test_what_all_ranks_have_is_told_by_the_first(fail, monkeypatch):
    monkeypatch.setattr(errors, "WAIT_SECONDS", 0.1)
    assert fail(8, "no such\nfile", local_rank=0) == "error: rank 8: no such file\n"
    assert fail(9, "no such\nfile", local_rank=1) == ""
    assert fail(10, "no GPU", local_rank=2) == "error: rank 10: no GPU\n"
    assert fail(9, "no such", local_rank=1) == "error: rank 9: no such\n"


def test_a_rank_that_comes_first_waits_for_the_one_that_speaks(fail, monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "WAIT_SECONDS", 20.0)
    told = tmp_path / "attempt_0" / "told"
    speaks = threading.Timer(0.2, lambda: told.write_text("no such file\n"))
    speaks.start()
    assert fail(1, "no such file") == ""
    speaks.join()


def test_a_rank_that_is_asked_to_go_meanwhile_speaks_at_once(fail, monkeypatch):
    monkeypatch.setattr(errors, "WAIT_SECONDS", 20.0)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        asks = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        began = time.monotonic()
        asks.start()
        assert fail(1, "no GPU") == "error: rank 1: no GPU\n"
        assert time.monotonic() - began < 10
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_a_place_to_meet_every_rank_speaks(fail, monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "WAIT_SECONDS", 0.1)
    (tmp_path / "attempt_0" / "told").mkdir(parents=True)  # can be neither written nor read
    assert fail(0, "no such file") == "error: no such file\n"
    assert fail(1, "no such file") == "error: rank 1: no such file\n"


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_without_torchruns_files_every_rank_speaks_for_itself(monkeypatch, capfd, variable):
    for name in ("TORCHELASTIC_ERROR_FILE", "RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    errors.print_error("no such file")
    monkeypatch.setenv(variable, "3")
    errors.print_error("no such file")
    assert capfd.readouterr().err == "error: no such file\nerror: rank 3: no such file\n"


def test_torchruns_report_has_the_message_of_the_first(fail, monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "WAIT_SECONDS", 0.0)
    fail(0, "no such file")
    fail(1, "no GPU")
    files = [str(tmp_path / "attempt_0" / str(rank) / "error.json") for rank in (0, 1)]
    failures = {rank: ProcessFailure(rank, 100 + rank, 2, file) for rank, file in enumerate(files)}
    report = str(ChildFailedError("program", failures))
    assert "traceback : no GPU" in report and "traceback : no such file" in report
    assert failures[0].timestamp <= failures[1].timestamp


def test_a_path_that_is_no_utf8_is_told_as_others_are(fail, monkeypatch):
    monkeypatch.setattr(errors, "WAIT_SECONDS", 0.1)
    path = os.fsdecode(b"caf\xe9")  # as sys.argv has it
    assert fail(0, f"dump_dir={path}: is a file").startswith("error: dump_dir=caf")
    assert fail(1, f"dump_dir={path}: is a file") == ""
    assert "rank 1: " in fail(1, f"dump_dir={path}: cannot be written")


def test_what_is_told_half_so_far_is_none_yet(fail, monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "WAIT_SECONDS", 0.1)
    (tmp_path / "attempt_0").mkdir()
    (tmp_path / "attempt_0" / "told").write_bytes("é".encode()[:1])
    assert fail(1, "é") == "error: rank 1: é\n"


def test_an_error_file_of_another_launcher_is_written_and_nothing_waits(
    monkeypatch, capfd, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(errors, "_is_told", lambda *_: pytest.fail("asked another rank"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    errors.print_error("no such file")
    assert capfd.readouterr().err == "error: no such file\n"
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


def test_a_thread_tells_as_well(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    thread = threading.Thread(target=errors.print_error, args=["no such file"])
    thread.start()
    thread.join()
    assert capfd.readouterr().err == "error: no such file\n"
    assert (tmp_path / "told").read_text() == "no such file\n"
