"""An error that all ranks of a machine have alike is told by the first of them alone.

torchrun ends all ranks as soon as one has ended, so a rank may not leave in silence before the one
that speaks for it has spoken. That it has is written beside the files that torchrun gives ranks for
their errors, TORCHELASTIC_ERROR_FILE = <attempt>/<local rank>/error.json. Who does not find it
there speaks for itself: no error of a single rank is lost.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WAIT_SECONDS = 5.0  # for local rank 0, which may come later to the error that it shares
POLL_SECONDS = 0.02


def tell(message: str) -> None:
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
