"""Mistakes that a user can mend, and faults of a machine: one line on stderr, no traceback."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lingua.redact import redact

MAX_LENGTH = 2000  # characters of a message
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG}


class UserError(ValueError):
    """A mistake that the user can mend, shown as one line without a traceback.

    The message names the dotted option (or file and line), the value, and what would work.
    """


class MachineFault(RuntimeError):
    """What a machine does to a program, as a full disk: where in the code tells nothing."""


def is_machine_fault(error: BaseException) -> bool:
    """Whether it is a MachineFault, or an OSError of a disk that is full, read-only or broken."""
    is_disk = isinstance(error, OSError) and error.errno in DISK_FAULTS
    return is_disk or isinstance(error, MachineFault)


def run_cli(main: Callable[[list[str]], Any]) -> None:
    """Run `main(argv)`; a UserError becomes one line on stderr and exit status 2, a fault of the
    machine one and status 1, Ctrl-C 130. Ranks that have the same error tell it once.

    Any other error ends the process with its traceback.
    """
    sys.excepthook = print_traceback
    try:
        main(sys.argv[1:])
    except (UserError, MachineFault, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            error = UserError(f"{error.filename}: {error.strerror}")
        if not isinstance(error, UserError) and not is_machine_fault(error):
            raise
        print_error(one_line(error))
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None  # 128 + SIGINT, as shells say it


def one_line(error: Exception) -> str:
    """The message as it is shown: a value in it may have lines, and be as long as it likes."""
    text = redact(" ".join(str(error).splitlines()))
    return (
        text
        if len(text) <= MAX_LENGTH
        else f"{text[: MAX_LENGTH // 2]} ... {text[-MAX_LENGTH // 2 :]}"
    )


def first_line(error: BaseException) -> str:
    """What an error of another package says, as a part of a message of one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def print_traceback(kind: type[BaseException], error: BaseException, tb: Any) -> None:
    """Python's own excepthook, less the secrets that an error's text may have got hold of."""
    text = "".join(traceback.format_exception(kind, error, tb))
    print(redact(text), file=sys.stderr, end="", flush=True)


def import_optional(module: str, *, extra: str, needed_by: str) -> Any:
    """Import a package that not every machine has; its absence is a UserError naming the cure."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # the package is there; something that it needs itself is not
        target = f"'.[{extra}]'" if extra else "."
        raise UserError(
            f"{needed_by} needs the package {error.name}: pip install -e {target}"
        ) from None


WAIT_SECONDS = 5.0  # for local rank 0, which may come later to the error that it shares


POLL_SECONDS = 0.02


def print_error(message: str) -> None:
    """Print an error, which is one line, on stderr, unless local rank 0 has printed the same."""
    name, local_rank = (os.environ.get(n) for n in ("TORCHELASTIC_ERROR_FILE", "LOCAL_RANK"))
    if not name:
        _print(message)
        return
    began, error_file = time.time(), Path(name)
    told = error_file.parent.parent / "told"
    with _signals_end(wait := _Wait()):
        # Without a local rank the file is another launcher's, and nobody else speaks.
        if local_rank in (None, "0") or not _is_told(message, told, wait):
            _print(message)
        if local_rank == "0":
            with suppress(OSError):  # then the others speak, too
                told.write_bytes(_told_as(message))
        _record(message, error_file, began)


def _print(message: str) -> None:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    who = "" if rank == "0" else f"rank {rank}: "
    print(f"error: {who}{message}", file=sys.stderr, flush=True)


def _told_as(message: str) -> bytes:
    """Also of a path that is no UTF-8, of which Python makes halves of surrogate pairs."""
    return (message + "\n").encode("utf-8", "backslashreplace")


def _is_told(message: str, told: Path, wait: _Wait) -> bool:
    while True:
        is_last = wait.is_over()  # asked first: its end may be that of the rank that has told it
        with suppress(OSError):
            if told.read_bytes() == _told_as(message):
                return True
        if is_last:
            return False
        time.sleep(POLL_SECONDS)


class _Wait:
    def __init__(self) -> None:
        self.end = time.monotonic() + WAIT_SECONDS

    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def stop(self, *_: object) -> None:
        self.end = 0.0


@contextmanager
def _signals_end(wait: _Wait) -> Iterator[None]:
    """What torchrun sends when another rank has ended must not end this one before it has told.

    Only the main thread may say so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, wait.stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _record(message: str, error_file: Path, when: float) -> None:
    """What torchrun's own report then tells, in the form that its `record` writes."""
    details = {"py_callstack": message, "timestamp": str(int(when))}
    text = json.dumps({"message": {"message": message, "extraInfo": details}})
    with suppress(OSError):
        error_file.write_text(text, encoding="utf-8")
