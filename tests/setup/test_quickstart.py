"""setup/quickstart.sh with a python that only records its arguments."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "setup" / "quickstart.sh"
PYTHON = """#!/bin/bash
[[ $1 != -c ]] || cat >/dev/null
[[ $1 == -c || $1 == - || "$*" == "-m pip --version" ]] || echo "$*" >>"$(dirname "$0")/commands"
[[ $2 != "$FAILING" ]] || exit 2
"""


def run(tmp_path: Path, *options: str, failing: str = "none") -> tuple[int, str, list[str]]:
    """Return the exit status, stdout, and the commands after the data are prepared."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "VENV": str(tmp_path), "FAILING": failing}
    done = subprocess.run(
        ["bash", SCRIPT, *options], env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, (python.parent / "commands").read_text().splitlines()[1:]


@pytest.mark.parametrize(
    "options, folder",
    [
        ((), "runs/quickstart"),
        (("model.loop_count=4",), "runs/quickstart"),
        (("dump_dir=runs/q4", "steps=7"), "runs/q4"),
        (("dump_dir=a", "dump_dir=/b c"), "/b c"),
    ],
)
def test_the_script_trains_samples_and_plots_in_dump_dir(tmp_path, options, folder):
    status, output, (train, generate, plot, references) = run(tmp_path, *options)
    assert status == 0
    assert train.endswith(f"dump_dir={folder}") and all(option in train for option in options)
    assert f"ckpt={folder} " in generate
    assert plot == f"-m apps.LT2.scripts.plot_loss {folder}"
    assert references == f"setup/reference_values.py {folder}"
    assert f"{folder}/metrics.jsonl" in output
    lines = output.replace("\\\n", "").splitlines()
    tried = [shlex.split(line) for line in lines if line.startswith("lt2 ")]
    assert len(tried) == 5 and f"ckpt={folder}" in tried[0]


def test_the_script_ends_with_a_refused_run(tmp_path):
    status, _, commands = run(tmp_path, "model.loop_count=4", failing="apps.LT2.train")
    assert status == 2 and len(commands) == 1


def test_the_suggested_folders_are_not_those_of_the_results():
    script, results = (path.read_text() for path in (SCRIPT, ROOT / "docs/results/README.md"))
    suggested, used = (set(re.findall(r"dump_dir=(runs/\w+)", text)) for text in (script, results))
    assert suggested and used and not suggested & used
