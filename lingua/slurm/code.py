"""A copy of the code that a run starts from, and the commit it is.

Copied is what git tracks and what it does not ignore, submodules included; outside git, the Python
and YAML files.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lingua.errors import UserError

logger = logging.getLogger(__name__)

CODE_VERSION = "code_version.json"  # in a run's folder, beside the copy of its code
MAX_UNTRACKED_BYTES = 16 * 2**20  # an untracked file above this is data that .gitignore forgot
NO_CODE = ("pyvenv.cfg", "base_config.yaml")  # what tells an environment, and a run's folder
SUFFIXES = {".py", ".yaml", ".yml"}  # what is copied where there is no git


@dataclass(frozen=True)
class CodeVersion:
    commit: str | None  # None outside git
    dirty: bool  # whether files differ from the commit

    def __str__(self) -> str:
        changed = ", with changes" if self.dirty else ""
        return f"commit {self.commit[:10]}{changed}" if self.commit else "not in git"


def git(root: Path, *command: str) -> str | None:
    """What a git command prints, or None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def code_version(root: Path) -> CodeVersion:
    commit = git(root, "rev-parse", "HEAD")
    if commit is None or not git(root, "ls-files"):  # the folder is in another repository, ignored
        return CodeVersion(commit=None, dirty=False)
    return CodeVersion(commit.strip(), dirty=bool(git(root, "status", "--porcelain", "--", ".")))


def version_record(root: Path) -> str:
    """The text of a run's CODE_VERSION file."""
    record = {**asdict(code_version(root)), "root": str(root)}
    return json.dumps(record, indent=2) + "\n"


def list_code(root: Path) -> list[Path]:
    """The files that make up the code below `root`, relative to it."""
    tracked = (git(root, "ls-files", "-z") or "").split("\0")
    untracked = (git(root, "ls-files", "-z", "--others", "--exclude-standard") or "").split("\0")
    if not any(tracked) and not any(untracked):
        return sorted(_walk(root))
    files = []
    for name in filter(None, tracked):
        path = root / name
        if path.is_symlink() or not path.is_dir():
            files.append(Path(name))
        elif (path / ".git").exists():  # a submodule; one that is not checked out is empty
            files += [Path(name) / file for file in list_code(path)]
    for name in filter(None, untracked):
        size = os.lstat(root / name).st_size
        if name.endswith("/"):
            logger.warning("not copied with the code: %s (a git repository of its own)", name)
        elif size > MAX_UNTRACKED_BYTES:
            logger.warning(
                "not copied with the code: %s (%.0f MiB, not in git)", name, size / 2**20
            )
        else:
            files.append(Path(name))
    # A file that git tracks may be deleted on disk.
    return sorted({file for file in files if (root / file).exists()})


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith((".", "__pycache__"))
            and not any(Path(folder, name, mark).exists() for mark in NO_CODE)
        ]
        for name in names:
            if Path(name).suffix in SUFFIXES:
                yield Path(folder, name).relative_to(root)


def code_to_copy(root: Path, without: Path) -> list[Path]:
    """The code below `root` but what lies in `without`, relative to `root`; UserError for a file
    that may not be read."""
    without = without.resolve()
    files = [file for file in list_code(root) if not (root / file).is_relative_to(without)]
    for file in files:
        if not os.access(root / file, os.R_OK):
            raise UserError(
                f"{root / file}: may not be read, and is part of the code; let git ignore it, or "
                "use copy_code=false"
            )
    return files


def snapshot_code(root: Path, target: Path, without: Path) -> int:
    """Copy the code below `root` to `target`, except what lies in `without`; how many files.

    The copy is made aside and then put in place, so that `target` holds no file of an older one.
    """
    files = code_to_copy(root, without)
    aside, old = (target.with_name(f".{target.name}.{name}") for name in ("tmp", "old"))
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir()
    try:
        for file in files:
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            copy(root, file, aside / file)
        if target.exists():
            target.rename(old)  # which may be done where its files may not be deleted
        aside.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)  # a run may go on with it
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return len(files)


def copy(root: Path, file: Path, target: Path) -> None:
    """Copy `file` below `root`. A link to a folder below `root` is one to its copy."""
    source = root / file
    if not source.is_dir():
        shutil.copy2(source, target)
        return
    folder = source.resolve()
    is_inside = folder.is_relative_to(root.resolve())
    target.symlink_to(os.path.relpath(folder, source.parent.resolve()) if is_inside else folder)
