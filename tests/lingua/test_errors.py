"""A program ends with one line for a user's mistake, and a traceback without secrets for a bug."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

import pytest

from lingua.errors import UserError, import_optional, run_cli


def test_run_cli_prints_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # run_cli replaces it
    monkeypatch.delenv("RANK", raising=False)

    def mistaken(argv):
        raise UserError("steps=0 must be\npositive")

    with pytest.raises(SystemExit) as stop:
        run_cli(mistaken)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: steps=0 must be positive\n"

    def on_a_full_disk(argv):
        Path("/dev/full").write_text("x")

    with pytest.raises(SystemExit) as stop:
        run_cli(on_a_full_disk)
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: No space left on device;")

    for bug in (ValueError("a bug"), FileNotFoundError("a bug")):

        def broken(argv, bug=bug):
            raise bug

        with pytest.raises(type(bug), match="a bug"):
            run_cli(broken)

    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_cli(interrupted)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_file_name_that_is_too_long_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda _: Path("a" * 300).exists())
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {'a' * 300}: File name too long\n"


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"logging\.wandb needs .* pip install -e '\.\[wandb\]'"):
        import_optional("no_such_package_here", extra="wandb", needed_by="logging.wandb")

    # A broken package is not the user's mistake.
    (tmp_path / "broken_package_here.py").write_text("import its_own_missing_need")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_own_missing_need"):
        import_optional("broken_package_here", extra="x", needed_by="y")


def raise_chained():
    try:
        raise OSError(errno.EFBIG, "File too large")
    finally:
        raise RuntimeError("unexpected pos 704 vs 598")  # as torch does


def raise_of_rust():
    raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")


def fail_with(number: int, *names: str):
    def fail():
        raise OSError(number, os.strerror(number), *names)

    return fail


@pytest.mark.parametrize(
    "fail, want",
    [
        (fail_with(errno.ENOSPC), "No space left on device; free some space"),
        (fail_with(errno.ENOSPC, "a/b"), "a/b: No space left on device; free"),
        (fail_with(errno.EDQUOT, "a/b"), "a/b: Disk quota exceeded; free"),
        (fail_with(errno.EROFS, "a/b"), "a/b: Read-only file system"),
        (raise_chained, "File too large; raise the limit .*ulimit -f"),
        (raise_of_rust, "No space left on device; free"),
    ],
)
def test_a_disk_that_cannot_be_written_is_one_plain_line(monkeypatch, capsys, fail, want):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as left:
        run_cli(lambda argv: fail())
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {want}", line) and "Errno" not in line


@pytest.mark.parametrize("fail", [fail_with(errno.ENOENT), lambda: 1 / 0])
def test_other_errors_keep_their_traceback(monkeypatch, fail):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises((FileNotFoundError, ZeroDivisionError)):
        run_cli(lambda argv: fail())


def test_a_traceback_shows_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("MY_API_KEY", "swordfish-1")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def fail(argv):
        raise RuntimeError(f"refused: {os.environ['MY_API_KEY']}")

    with pytest.raises(RuntimeError) as left:
        run_cli(fail)
    sys.excepthook(left.type, left.value, left.tb)
    err = capsys.readouterr().err
    assert "Traceback" in err and "in fail" in err
    assert "swordfish" not in err and "refused: <MY_API_KEY hidden>" in err
