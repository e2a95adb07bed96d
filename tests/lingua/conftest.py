"""Fixtures: a config file, a run with checkpoints, a project to launch, and a fake cluster."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lingua.stool import StoolArgs
from tests.lingua.checkpointing.checkpoint_runs import CONFIG, build, manager_at, train
from tests.lingua.stool_utils import git

REPOSITORY = Path(__file__).parents[2]

# A tiny training script that prints where it ran, and its options.
SCRIPT = """
from __future__ import annotations
import json, os, sys
from dataclasses import asdict, dataclass, field
from lingua.args import parse_args
from lingua.errors import UserError, run_cli
from project.tiny.helper import WORD

@dataclass
class Optim:
    lr: float = 1.0

@dataclass
class TrainArgs:
    name: str = "tiny"
    dump_dir: str = ""
    steps: int = 1
    corpus: str = ""
    optim: Optim = field(default_factory=Optim)

def validate_before_submit(args, world_size):
    if world_size > 64:
        raise UserError(f"nodes: {world_size} processes are too many")

def input_paths(args):
    return {"corpus": args.corpus}

def main(argv):
    args = parse_args(TrainArgs, argv, prog="tiny")
    seen = dict(args=asdict(args), word=WORD, file=__file__, cwd=os.getcwd(),
                rank=os.environ.get("RANK"), dump=os.environ["DUMP_DIR"])
    print(json.dumps(seen), flush=True)
    print("to stderr", file=sys.stderr)
    if args.steps == 13:
        sys.exit("no luck")

if __name__ == "__main__":
    run_cli(main)
"""


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return f"config={path}"

    return write


@pytest.fixture
def run(tmp_path):
    """A run in one process with checkpoints of steps 1 and 2."""
    model, optimizer, state = build()
    manager = manager_at(tmp_path / "checkpoints")
    for step in (1, 2):
        train(step, model, optimizer, state)
        manager.save(model, optimizer, state, CONFIG)
    return manager, model, optimizer, state


@pytest.fixture(scope="session")
def first_project(tmp_path_factory) -> Path:
    """The repository that `project` copies."""
    root = tmp_path_factory.mktemp("project")
    package = root / "project" / "tiny"
    package.mkdir(parents=True)
    (package / "train.py").write_text(SCRIPT)
    (package / "helper.py").write_text("WORD = 'first'\n")
    (root / "run.yaml").write_text("# a comment\nname: try\ndump_dir: runs/a b\nsteps: 3\n")
    (root / ".gitignore").write_text("runs/\nsecret.py\n")
    (root / "secret.py").write_text("KEY = 1\n")
    git(root, "init", "-q", "--template=")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    return root


@pytest.fixture
def project(first_project, tmp_path, monkeypatch) -> Iterator[Path]:
    """A repository with a script `project.tiny.train`. Its path has a space."""
    root = shutil.copytree(first_project, tmp_path / "my project")
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # jobs import lingua
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # tests compare folders
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    for variable in [v for v in os.environ if v.startswith("SLURM_")]:
        monkeypatch.delenv(variable)
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "project"]:
        del sys.modules[name]


@pytest.fixture
def args(project) -> StoolArgs:
    script = "project.tiny.train"
    return StoolArgs(config="run.yaml", script=script, launcher="bash", nodes=1, ngpu=1)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A cluster of shell scripts: sbatch runs the job, and srun runs two of its ranks."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    programs = {
        # like SLURM, it fails without the folder of its log file
        "sbatch": 'test -d "$(dirname "$1")/logs" || exit 1\n'
        f'echo "$@" >>{tmp_path}/sbatch.log; SLURM_JOB_ID=7 bash "$1"',
        "sinfo": 'case "$*" in *typo*) ;; *partition=*) echo gpu 2-00:00:00;; '
        "*) echo gpu 2-00:00:00; echo 'small* 1-00:00:00';; esac",
        "srun": f'printf "%s\\n" "$*" >>{tmp_path}/srun.log\n'
        'while [ "$1" != -N ]; do shift; done; shift 2\n'
        'for RANK in 0 1; do export RANK; "$@"; done',
    }
    for name, text in programs.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    return tmp_path
