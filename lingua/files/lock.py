"""Lock a folder, so that only one process writes to it at a time.

The lock is a POSIX lock. The package `filelock` takes flock locks, which forked workers inherit in
older versions, which don't record their holder, and which earlier runs of this project don't see.
A POSIX lock belongs to the process, which loses it when it closes any handle of the lock file.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from lingua.errors import UserError

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"


@contextmanager
def lock_folders(folders: Mapping[str, str | os.PathLike]) -> Iterator[None]:
    """Lock existing folders (option to path), or raise UserError if another process has one.

    The kernel releases the locks when the process ends, even if it is killed.
    """
    job = os.environ.get("SLURM_JOB_ID")
    holder = f"process {os.getpid()} on {socket.gethostname()}{f', SLURM job {job}' if job else ''}"
    with ExitStack() as files:
        for option, folder in folders.items():
            with _refused(option, folder):
                file = files.enter_context(open(Path(folder, LOCK_NAME), "a+", encoding="utf-8"))
            _check_free(_lock(file), option, folder)
            with _refused(option, folder):
                file.truncate(0)
                os.write(file.fileno(), f"{holder}\n".encode())  # nothing is left for close()
        yield


@contextmanager
def make_and_lock_folders(
    folders: Mapping[str, str | os.PathLike], *, is_master: bool
) -> Iterator[None]:
    """Make the folders (option to path) and lock them on rank 0.

    Not a collective: it runs before the process group exists.
    """
    for option, folder in folders.items():
        make_writable(option, Path(folder))
    with lock_folders(folders if is_master else {}):
        yield


def check_unlocked(option: str, folder: Path) -> None:
    """Raise UserError if another process has locked the folder. Write nothing.

    Not for a folder that this process has locked: that would release the lock.
    """
    with suppress(OSError), open(folder / LOCK_NAME, encoding="utf-8") as file:
        # Shared, because all ranks may check at the same time.
        _check_free(_lock(file, fcntl.LOCK_SH), option, folder)


def make_writable(option: str, folder: Path) -> None:
    check_writable(option, folder)
    with _refused(option, folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_writable(option: str, folder: Path) -> None:
    """Raise UserError unless the folder, or its first parent that exists, can be written."""
    with _refused(option, folder):
        while not folder.exists() and not folder.is_symlink():  # a dead link cannot be replaced
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")


@contextmanager
def _refused(option: str, folder: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option}={folder}: cannot write there ({error.strerror}); use a writable folder"
        ) from None


def _lock(file: IO[str], kind: int = fcntl.LOCK_EX) -> str | None:
    """Lock the file, or return the process that has locked it. Warn if it cannot be locked."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return file.read().strip() or "unknown process"
    except OSError as error:
        logger.warning("%s cannot be locked (%s)", file.name, error.strerror)
    return None


def _check_free(holder: str | None, option: str, folder: str | os.PathLike) -> None:
    if holder is not None:
        raise UserError(
            f"{option}={folder}: another run writes there ({holder}); wait for it, stop it, or "
            "use another folder"
        )
