"""What tests of stool look at: a repository, and what a job said."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout


def said(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
