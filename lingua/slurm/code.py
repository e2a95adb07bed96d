"""Copy the code that a run starts from, and record its git commit.

The copy has the files that git tracks or does not ignore, with submodules. Outside git, it has the
Python and YAML files.
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

logger = logging.getLogger(__name__)

CODE_VERSION = "code_version.json"
MAX_UNTRACKED_BYTES = 16 * 2**20  # a larger untracked file is data that .gitignore forgot
NOT_CODE = ("pyvenv.cfg", "base_config.yaml")  # mark a virtual environment, and a run's folder
SUFFIXES = {".py", ".yaml", ".yml"}  # copied outside git


@dataclass(frozen=True)
class CodeVersion:
    commit: str | None  # None outside git
    dirty: bool  # whether files differ from the commit

    def __str__(self) -> str:
        changed = ", with changes" if self.dirty else ""
        return f"commit {self.commit[:10]}{changed}" if self.commit else "not in git"


def git(root: Path, *command: str) -> str | None:
    """Return what a git command prints, or None without git or a repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def code_version(root: Path) -> CodeVersion:
    commit = git(root, "rev-parse", "HEAD")
    if commit is None or not git(root, "ls-files"):  # the folder is ignored by another repository
        return CodeVersion(commit=None, dirty=False)
    return CodeVersion(commit.strip(), dirty=bool(git(root, "status", "--porcelain", "--", ".")))


def version_record(root: Path) -> str:
    """Write the text of a run's CODE_VERSION file."""
    record = {**asdict(code_version(root)), "root": str(root)}
    return json.dumps(record, indent=2) + "\n"


def list_code(root: Path, without: Path | None = None) -> list[Path]:
    """List the files of the code, relative to `root`. Leave out the folder `without`."""

    def ls_files(*options: str) -> list[str]:
        return (git(root, "ls-files", "-z", *options) or "").split("\0")[:-1]

    tracked, untracked = ls_files(), ls_files("--others", "--exclude-standard")
    files = [] if tracked or untracked else list(_walk(root))
    for name in tracked:
        path = root / name
        if path.is_symlink() or not path.is_dir():
            files.append(Path(name))
        elif (path / ".git").exists():  # a submodule that is checked out
            files += [Path(name) / file for file in list_code(path)]
    for name in untracked:
        size = os.lstat(root / name).st_size
        if name.endswith("/"):
            logger.warning("the copy of the code leaves out the git repository %s", name)
        elif size > MAX_UNTRACKED_BYTES:
            mib = size / 2**20
            logger.warning("the copy of the code leaves out %s (%.0f MiB, not in git)", name, mib)
        else:
            files.append(Path(name))
    # git still lists a tracked file that was deleted
    files = [file for file in files if (root / file).exists()]
    if without is not None:
        files = [file for file in files if not (root / file).is_relative_to(without.resolve())]
    return sorted(set(files))


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith((".", "__pycache__"))
            and not any(Path(folder, name, mark).exists() for mark in NOT_CODE)
        ]
        for name in names:
            if Path(name).suffix in SUFFIXES:
                yield Path(folder, name).relative_to(root)


def snapshot_code(root: Path, target: Path, without: Path) -> int:
    """Copy the code below `root` to `target`, and return the number of files.

    Replace an older copy as a whole, or keep it if the copy fails. Leave out the folder `without`.
    """
    files = list_code(root, without)
    new, old = (target.with_name(f".{target.name}.{name}") for name in ("tmp", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir()
    try:
        for file in files:
            (new / file).parent.mkdir(parents=True, exist_ok=True)
            _copy(root, file, new / file)
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return len(files)


def _copy(root: Path, file: Path, target: Path) -> None:
    """Copy a file. A link to a folder below `root` becomes a link to the folder's copy."""
    source = root / file
    if not source.is_dir():
        shutil.copy2(source, target)
        return
    folder = source.resolve()
    is_inside = folder.is_relative_to(root.resolve())
    target.symlink_to(os.path.relpath(folder, source.parent.resolve()) if is_inside else folder)
