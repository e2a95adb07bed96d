"""Plan a run and write its folder. All checks come before the first write."""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lingua.args import config_as_yaml, parse_args
from lingua.errors import UserError
from lingua.files.atomic import write_atomic
from lingua.files.lock import (
    LOCK_NAME,
    check_unlocked,
    check_writable,
    lock_folders,
    make_writable,
)
from lingua.slurm.background import fill_in_ngpu
from lingua.slurm.code import (
    CODE_VERSION,
    code_version,
    link_code,
    snapshot_code,
    version_record,
)
from lingua.slurm.script import Job, StoolArgs, render_submit

RUN_MARKS = ("base_config.yaml", "config.yaml", "submit.slurm")  # each marks the folder of a run
LOGS = "logs"


def plan_run(args: StoolArgs) -> Job:
    """Check everything that can be checked. A mistake is a UserError; nothing is written."""
    if args.nodes < 1:
        raise UserError(f"nodes={args.nodes}: set the number of machines, e.g. nodes=1")
    args = fill_in_ngpu(args)
    module = import_script(args.script)
    run_args = read_run_args(args, module)
    check_launcher(args)
    assert module.__file__, f"{args.script} has no file"
    root = Path(module.__file__).resolve().parents[args.script.count(".")]
    dump_dir = Path(run_args.dump_dir).absolute()
    is_mapping = isinstance(args.config, Mapping)
    job = Job(
        args=args,
        name=getattr(run_args, "name", "") or dump_dir.name,
        config=config_as_yaml(args.config) if is_mapping else Path(args.config).read_text("utf-8"),
        dump_dir=dump_dir,
        workdir=Path.cwd(),
        root=root,
        python=find_environment_python(args.anaconda),
        time_limit=find_time_limit(args),
        run_args=run_args,
    )
    config = None if is_mapping else args.config
    inputs = {"script": root, "anaconda": job.python, "config": config, "workdir": job.workdir}
    inputs |= getattr(module, "input_paths", lambda run_args: {})(run_args)
    try:
        check_may_use(job, inputs)
    except OSError as error:
        raise UserError(f"dump_dir={dump_dir}: cannot be read ({error.strerror})") from None
    check_writable("dump_dir", dump_dir)
    check_unlocked("dump_dir", dump_dir)
    return job


# ---- checks


def check_launcher(args: StoolArgs) -> None:
    if args.launcher == "sbatch":
        if shutil.which("sbatch") is None and not args.dry_run:
            raise UserError(
                "launcher=sbatch: this machine has no sbatch; log in to the cluster, or use "
                "launcher=bash to run here, or dry_run=true to see the job"
            )
    elif args.dependency:
        raise UserError(f"dependency={args.dependency} needs launcher=sbatch; bash starts at once")
    elif args.nodes > 1 and "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            f"launcher=bash nodes={args.nodes} needs an allocation (salloc); use nodes=1 without"
        )


def import_script(script: str) -> ModuleType:
    name = script.removesuffix(".py").replace("/", ".").strip(".") or "apps.LT2.train"
    if name != script:
        raise UserError(f"script={script} must be a module, e.g. script={name}")
    try:
        return importlib.import_module(script)
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"script={script}: cannot be imported from {os.getcwd()} ({error}); use a module, e.g. "
            "script=apps.LT2.train"
        ) from None


def read_run_args(args: StoolArgs, module: ModuleType) -> Any:
    """Read the script's options and apply the script's own checks."""
    run_args = parse_run_args(args, module)
    check = getattr(module, "validate_before_submit", None)
    if check is not None:
        check(run_args, args.nodes * args.ngpu)
    return run_args


def parse_run_args(args: StoolArgs, module: ModuleType) -> Any:
    names = [name for name in ("TrainArgs", "EvalArgs") if hasattr(module, name)]
    classes = [getattr(module, name) for name in names]
    if not classes:
        raise UserError(f"script={args.script} has no TrainArgs or EvalArgs to check the config")
    # An evaluation script may also import TrainArgs.
    own = [c for c in classes if c.__module__ == module.__name__] or classes
    if not args.config:
        raise UserError("config is not set: use a YAML file, e.g. config=run.yaml")
    if isinstance(args.config, Mapping):
        run_args = parse_args(own[0], args.overrides, config=args.config)
    else:
        run_args = parse_args(own[0], [f"config={args.config}", *args.overrides])
    if not getattr(run_args, "dump_dir", None):
        raise UserError("dump_dir is empty: set it in the config, or after `--`")
    return run_args


def find_environment_python(anaconda: str) -> Path:
    if anaconda == "default":
        return Path(sys.executable)
    python = Path(anaconda).expanduser().absolute() / "bin" / "python"
    if not python.is_file():
        raise UserError(
            f"anaconda={anaconda}: no {python}; use the folder of a conda or virtual environment"
        )
    return python


def find_time_limit(args: StoolArgs) -> str:
    """Return the limit in SLURM's format, by default the maximum of the partition."""
    if args.time != -1:
        return str(args.time)
    if args.launcher != "sbatch" or shutil.which("sinfo") is None:
        return ""
    partition = [f"--partition={args.partition}"] if args.partition else []
    command = ["sinfo", "--noheader", "--format=%P %l", *partition]
    answer = subprocess.run(command, capture_output=True, text=True)
    rows = [line.split() for line in answer.stdout.splitlines()]
    # sinfo marks the default partition with *
    limits = [row[-1] for row in rows if partition or row[0].endswith("*")]
    if answer.returncode == 0 and partition and not limits:
        raise UserError(f"partition={args.partition}: SLURM has no such partition; see sinfo -s")
    return {"infinite": "UNLIMITED"}.get(limits[0], limits[0]) if limits else ""


def check_may_use(job: Job, inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse a dump_dir with files, unless the run may continue in it or may rename it.

    `inputs` maps options to paths that the run reads. A folder with one of them is not renamed.
    """
    folder = job.dump_dir
    if is_free(folder):
        return
    if not folder.is_dir():
        raise UserError(f"dump_dir={folder} is a file; use a folder")
    if not job.args.override and not job.args.dirs_exists_ok:
        raise UserError(
            f"dump_dir={folder} exists; use another, continue its run with dirs_exists_ok=true, or "
            "rename it with override=true"
        )
    for option, path in inputs.items() if job.args.override else ():
        for resolve in (os.path.abspath, os.path.realpath):  # the link, and its target
            if path and Path(resolve(path)).is_relative_to(resolve(folder)):
                raise UserError(
                    f"override=true dump_dir={folder} would rename a folder that contains "
                    f"{option}={path}; use another dump_dir"
                )


def is_free(folder: Path) -> bool:
    """Whether the folder is missing, or holds nothing but a lock file."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name == LOCK_NAME for path in folder.iterdir())


# ---- the run's folder


def write_run(job: Job, code: Path | None = None) -> None:
    """Write the run's folder, with a copy of the code or a link to the copy `code`."""
    folder = job.dump_dir
    try:
        if job.args.override and not is_free(folder):
            with lock_folders({"dump_dir": folder}):
                old = folder.rename(old_name(folder))
            print(f"stool: renamed {folder} to {old}", flush=True)
        make_writable("dump_dir", folder)
        with lock_folders({"dump_dir": folder}):
            if not is_free(folder) and not job.args.dirs_exists_ok:
                raise UserError(f"dump_dir={folder} exists; another launch was faster")
            if code is not None:
                link_code(code, job.code)
            elif job.args.copy_code:
                n_files = snapshot_code(job.root, job.code, without=folder)
                print(f"stool: copied {n_files} files of code ({code_version(job.root)})")
            (folder / LOGS).mkdir(exist_ok=True)  # SLURM does not make it
            for name, text in run_files(job).items():
                write_atomic(folder / name, text)
    except OSError as error:
        raise UserError(f"dump_dir={folder}: cannot be written ({error})") from None


def old_name(folder: Path) -> Path:
    """Return the first free name of <folder>.old-1, <folder>.old-2, ..."""
    names = (folder.with_name(f"{folder.name}.old-{n}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def run_files(job: Job) -> dict[str, str]:
    """Map the names of a run's files to their texts, in the order of writing."""
    return {
        CODE_VERSION: version_record(job.root),
        "base_config.yaml": job.config,
        job.script.name: render_submit(job),
    }
