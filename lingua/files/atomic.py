"""Write a file completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lingua.errors import MachineFault, find_disk_fault


def write_atomic(path: str | os.PathLike, data: str | bytes) -> None:
    """Replace the content of a file. After a crash, the file has the old or the new content."""
    with open_atomic(path) as f:
        f.write(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def open_atomic(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file that durably replaces `path` when the block ends without an error."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(target)  # a failed write names no file
        elif fault := find_disk_fault(error):
            raise MachineFault(f"{target}: {fault}") from error
        raise
    fsync_path(target.parent)  # the rename itself must survive a power failure


def fsync_path(path: str | os.PathLike) -> None:
    """Flush a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
