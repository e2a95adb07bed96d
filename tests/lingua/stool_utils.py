"""Helpers for tests: a git repository, a job's output, limits, and a process with a lock."""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLD = """
import sys, time
from lingua.files.lock import lock_folders  # imports no torch
with lock_folders({"dump_dir": sys.argv[1]}):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Start a process that locks the folder, yield its id, and kill it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextmanager
def limited_files(n_bytes: int) -> Iterator[None]:
    """Let writes beyond `n_bytes` of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def without_root_powers() -> None:
    """Make file modes apply to root (see man capabilities). Call it in a child before exec."""
    drop_from_bounding_set, read_and_write_all, read_all = 24, 1, 2
    for power in (read_and_write_all, read_all):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, power, 0, 0, 0)


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
