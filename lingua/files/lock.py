"""A folder that one process writes to at a time: made, tried, and held while the process lives.

A POSIX lock belongs to the process: who opens and closes the lock file of a folder that this
process holds gives it up.
"""

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
            with _told(option, folder):
                file = files.enter_context(open(Path(folder, LOCK_NAME), "a+", encoding="utf-8"))
            _hold(file, option, folder)
        yield


def find_holder(folder: Path) -> str | None:
    """Return the process and host that hold the folder; None if it is free or cannot be locked.

    Write nothing. Not for a folder that this process holds: closing the file would release it.
    """
    try:
        with open(folder / LOCK_NAME, "r+", encoding="utf-8") as file:
            return None if _lock(file) else file.read().strip() or "unknown"
    except OSError:
        return None


def make_writable(option: str, folder: Path) -> None:
    with _told(option, folder):
        folder.mkdir(parents=True, exist_ok=True)
        _try(folder)


def check_writable(option: str, folder: Path) -> None:
    """As make_writable would find it, and nothing is made."""
    with _told(option, folder):
        there = folder
        while not there.exists() and not there.is_symlink():  # a dead link is in the way
            there = there.parent
        _try(there)


@contextmanager
def _told(option: str, folder: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option}={folder}: cannot write there ({error.strerror}); name a folder that this "
            "process may make and write to"
        ) from None


def _try(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:  # has no name where the system can do without
        file.write(b"x")


def _lock(file: IO[str]) -> bool:
    """Whether the file is locked now, and not by another process; OSError where locks fail."""
    try:
        # A POSIX lock: a forked worker does not inherit it, and network file systems know it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def _hold(file: IO[str], option: str, folder: str | os.PathLike) -> None:
    try:
        is_free = _lock(file)
    except OSError as error:
        logger.warning("%s=%s: cannot be locked (%s)", option, folder, error.strerror)
        is_free = True
    if not is_free:
        file.seek(0)
        raise UserError(
            f"{option}={folder}: another run writes there ({file.read().strip() or 'unknown'}); "
            "wait for it, stop it, or name another folder"
        )
    job = os.environ.get("SLURM_JOB_ID")
    file.truncate(0)
    file.write(
        f"process {os.getpid()} on {socket.gethostname()}{f', SLURM job {job}' if job else ''}\n"
    )
    file.flush()


@contextmanager
def own_folders(folders: Mapping[str, str | os.PathLike], *, is_master: bool) -> Iterator[None]:
    """Make the folders (option -> path), and hold them on rank 0: two runs would mix their files.

    No collective: it comes before the process group, which a refused rank 0 never joins.
    """
    for option, folder in folders.items():
        make_writable(option, Path(folder))
    if not is_master:
        yield
        return
    with hold_folders(folders):
        yield
