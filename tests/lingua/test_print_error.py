"""Local ranks print a shared error once, and never lose a rank's own error."""

from __future__ import annotations

import os
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import lingua.errors as errors
from lingua.errors import UserError, run_cli


@pytest.fixture
def fail(tmp_path, monkeypatch, capfd):
    """Let a rank of torchrun fail and return what it prints."""
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # run_cli replaces it

    def fail(rank: int, message: str) -> str:
        folder = tmp_path / "attempt_0" / str(rank)
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))

        def main(argv):
            raise UserError(message)

        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        assert exit_.value.code == 2
        return capfd.readouterr().err

    return fail


def test_local_ranks_print_the_same_error_once(fail):
    assert fail(1, "no such\nfile") == "error: no such file\n"
    assert fail(0, "no such\nfile") == ""
    assert fail(2, "no GPU") == "error: no GPU\n"
    assert fail(3, "no such") == "error: no such\n"


def test_every_rank_prints_if_the_folder_of_error_files_is_gone(fail, monkeypatch, tmp_path):
    monkeypatch.setattr(errors.Path, "touch", lambda *_, **__: (tmp_path / "gone" / "x").stat())
    assert fail(0, "no such file") == "error: no such file\n"
    assert fail(1, "no such file") == "error: no such file\n"


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_without_torchrun_every_rank_prints_with_its_rank(monkeypatch, capfd, variable):
    for name in ("TORCHELASTIC_ERROR_FILE", "RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    errors.print_error("no such file")
    monkeypatch.setenv(variable, "3")
    errors.print_error("no such file")
    assert capfd.readouterr().err == "error: no such file\nerror: rank 3: no such file\n"


def test_torchruns_report_has_the_message_of_each_rank(fail, tmp_path):
    fail(0, "no such file")
    fail(1, "no GPU")
    files = [str(tmp_path / "attempt_0" / str(rank) / "error.json") for rank in (0, 1)]
    failures = {rank: ProcessFailure(rank, 100 + rank, 2, file) for rank, file in enumerate(files)}
    report = str(ChildFailedError("program", failures))
    assert "traceback : no GPU" in report and "traceback : no such file" in report
    assert failures[0].timestamp <= failures[1].timestamp


def test_a_path_that_is_not_utf8_can_be_printed(fail):
    path = os.fsdecode(b"caf\xe9")  # as in sys.argv
    assert fail(0, f"dump_dir={path}: is a file").startswith("error: dump_dir=caf")
    assert fail(1, f"dump_dir={path}: is a file") == ""


def test_another_launcher_gets_its_error_file_and_no_marker(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    errors.print_error("no such file")
    assert capfd.readouterr().err == "error: no such file\n"
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]
