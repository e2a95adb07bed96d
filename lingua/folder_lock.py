"""A folder that one process writes to at a time: made, tried, and held while the process lives."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from lingua.errors import UserError

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"


@contextmanager
def hold_folders(folders: Mapping[str, str | os.PathLike]) -> Iterator[None]:
    """Hold the folders (option -> path), which are there, against every other process.

    The lock is the kernel's, so it goes when the process does, however it ends.
    """
    with ExitStack() as files:
        for option, folder in folders.items():
            file = files.enter_context(open(Path(folder, LOCK_NAME), "a+", encoding="utf-8"))
            _lock(file, option, folder)
        yield


def make_writable(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(
            f"{option}={folder}: cannot write there ({error.strerror}); name a folder that this "
            "process may make and write to"
        ) from None


def _lock(file: IO[str], option: str, folder: str | os.PathLike) -> None:
    try:
        # A POSIX lock: a forked worker does not inherit it, and network file systems know it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s=%s: cannot be locked (%s)", option, folder, error.strerror)
            return
        file.seek(0)
        raise UserError(
            f"{option}={folder}: another run writes there ({file.read().strip() or 'unknown'}); "
            "wait for it, stop it, or name another folder"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
