"""List files by name. A name that matches and is no readable file is an error, not a gap."""

from __future__ import annotations

import hashlib
import os
import stat
from fnmatch import fnmatchcase
from pathlib import Path

from lingua.errors import UserError

APPLE_DOUBLE = "._"  # prefix of the files in which macOS keeps attributes of other files


def list_files(folder: Path, pattern: str) -> list[str]:
    """Return the files in `folder` that match, sorted by name; [] without such a folder.

    Skip the `._*` files of macOS. UserError for another match that is no readable file.
    """
    files = [str(folder / name) for name in list_names(folder, pattern)]
    for file in files:
        check_file(file)
    return files


def list_names(folder: Path, pattern: str) -> list[str]:
    """Return the names in `folder` that match, sorted, without checking what they stand for."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None
    return sorted(n for n in names if fnmatchcase(n, pattern) and not n.startswith(APPLE_DOUBLE))


def check_file(file: str | os.PathLike) -> None:
    """Raise UserError for the problem that `find_file_problem` finds."""
    if problem := find_file_problem(file):
        raise UserError(f"{problem}; repair or remove it")


def find_file_problem(file: str | os.PathLike) -> str | None:
    """Return why `file` is not a file with content that can be read, or None. Follow links.

    Nothing is opened: to open a pipe would wait for its writer.
    """
    try:
        status = os.stat(file)
    except OSError as error:
        return f"{file}{link_target(file)} cannot be read ({error.strerror})"
    if stat.S_ISDIR(status.st_mode):
        return f"{file} is a folder, not a file"
    if not stat.S_ISREG(status.st_mode):
        return f"{file} is a pipe, a socket or a device, not a file"
    if not os.access(file, os.R_OK):
        return f"{file} cannot be read (Permission denied)"
    return f"{file} is empty" if status.st_size == 0 else None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_target(path: str | os.PathLike) -> str:
    """Return " (a link to ...)" for a link and "" for anything else, to complete a message."""
    return f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""
