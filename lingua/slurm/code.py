"""Copy the code that a run starts from, and record its git commit.

The copy has the files that git tracks, with submodules, and untracked source files that git does
not ignore. It has no untracked data or weights, no run and no environment, so that runs inside the
checkout don't copy each other. Outside git, it has the source files.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

CODE_VERSION = "code_version.json"
SUFFIXES = {".py", ".pyi", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".md", ".sh", ".slurm"}
SUFFIXES |= {".jinja", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"}  # of files that are code
MAX_BYTES = 2**20  # a larger file is data
MAX_NAMED = 4  # files that are left out
# Groups of files that mark a folder without code: environments, a sweep, and runs.
MARKS = (("pyvenv.cfg",), ("conda-meta",), ("sweep.json",))
MARKS += tuple(("base_config.yaml", name) for name in ("config.yaml", "submit.slurm", CODE_VERSION))


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


def find_code_version(root: Path) -> dict[str, str | bool | None]:
    """Return commit and dirty of the code in `root`, which may be a run's copy of the code."""
    version = asdict(code_version(root))
    if version["commit"] is None:
        with suppress(OSError, ValueError):
            saved = json.loads((root.parent / CODE_VERSION).read_text(encoding="utf-8"))
            version = {name: saved.get(name) for name in version}
    return version


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
    files += _find_code(root, untracked)
    # git still lists a tracked file that was deleted
    files = [file for file in files if (root / file).exists()]
    if without is not None:
        files = [file for file in files if not (root / file).is_relative_to(without.resolve())]
    return sorted(set(files))


def _find_code(root: Path, untracked: list[str]) -> list[Path]:
    """Return the untracked files that are code. Log which others the copy leaves out."""
    has_code: dict[Path, bool] = {Path(): True}

    def may_have_code(folder: Path) -> bool:
        if folder not in has_code:
            has_code[folder] = may_have_code(folder.parent) and _has_code(root / folder)
        return has_code[folder]

    code, others = [], []
    for name in untracked:
        file = Path(name)
        if name.endswith("/"):
            others.append(f"the git repository {name}")
        elif not may_have_code(file.parent):
            continue
        elif file.suffix in SUFFIXES and os.lstat(root / file).st_size <= MAX_BYTES:
            code.append(file)
        else:
            others.append(name)
    if others:
        more = ", ..." if len(others) > MAX_NAMED else ""
        logger.warning(
            "the copy of the code leaves out %d files that git does not track and that are not "
            "source files: %s%s; `git add` those that the run needs",
            *(len(others), ", ".join(others[:MAX_NAMED]), more),
        )
    return code


def _has_code(folder: Path) -> bool:
    """Whether a folder may hold code: it is not hidden, an environment, a sweep or a run."""
    is_other = any(all((folder / name).exists() for name in names) for names in MARKS)
    return not (is_other or folder.name.startswith(".") or folder.name == "__pycache__")


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if _has_code(Path(folder, name))]
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
        if target.is_symlink():  # of a run that a sweep started
            target.unlink()
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


def snapshot_for_all(root: Path, folder: Path) -> tuple[Path, int]:
    """Copy the code to folder/code for all runs in the folder; return the copy and its size.

    Runs that were started earlier keep their copy: if the code has changed since, the new copy is
    code.2, code.3, ...
    """
    names = (f"code{f'.{i}' if i > 1 else ''}" for i in itertools.count(1))
    copies = [folder / name for name in itertools.takewhile(lambda n: (folder / n).exists(), names)]
    new = folder / (f"code.{len(copies) + 1}" if copies else "code")
    n_files = snapshot_code(root, new, without=folder)
    for copy in copies:
        if _contents(copy) == _contents(new):
            shutil.rmtree(new)
            return copy, n_files
    return new, n_files


def _contents(folder: Path) -> dict[Path, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder): file.read_bytes() for file in files}


def link_code(copy: Path, target: Path) -> None:
    """Make `target`, the `code` of a run, a relative link to a copy that several runs share."""
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    target.symlink_to(os.path.relpath(copy, target.parent))


def _copy(root: Path, file: Path, target: Path) -> None:
    """Copy a file. A link to a folder below `root` becomes a link to the folder's copy."""
    source = root / file
    if not source.is_dir():
        shutil.copy2(source, target)
        return
    folder = source.resolve()
    is_inside = folder.is_relative_to(root.resolve())
    target.symlink_to(os.path.relpath(folder, source.parent.resolve()) if is_inside else folder)
