"""From what stool is asked for to a run's folder: all is checked before anything is written."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lingua.args import config_as_yaml, parse_args
from lingua.errors import UserError, is_machine_fault
from lingua.files.atomic import write_atomic
from lingua.files.lock import LOCK_NAME, check_unlocked, check_writable, lock_folders, make_writable
from lingua.slurm.code import CODE_VERSION, code_version, snapshot_code, version_record
from lingua.slurm.script import Job, StoolArgs, render_submit

RUN_MARKS = ("base_config.yaml", "config.yaml", "submit.slurm")  # what tells a run's folder
LOGS = "logs"


@dataclass(frozen=True)
class RunPlan:
    """A run that may be written."""

    job: Job
    config: str | Mapping[str, Any]  # as it was given: the text of a YAML file, or a mapping
    root: Path  # of the code


def plan_run(args: StoolArgs) -> RunPlan:
    """Check all that can be checked; a mistake is a UserError, and nothing was written."""
    if args.nodes < 1:
        raise UserError(f"nodes={args.nodes}: say on how many machines to run, e.g. nodes=1")
    module = import_script(args.script)
    run_args = read_run_args(args, module)
    check_launcher(args)
    job = plan_job(args, module, run_args)
    check_dump_dir(job, read_inputs(job, module, run_args))
    is_given = isinstance(args.config, Mapping)
    config = args.config if is_given else Path(args.config).read_text(encoding="utf-8")
    return RunPlan(job, config, code_root(args.script, module))


# ---- checks


def check_launcher(args: StoolArgs) -> None:
    if args.launcher == "sbatch" and shutil.which("sbatch") is None and not args.dry_run:
        raise UserError(
            "launcher=sbatch: there is no sbatch on this machine; log in to the cluster, or use "
            "launcher=bash to run here, or dry_run=true to see what would be submitted"
        )
    if args.launcher == "bash" and args.dependency:
        raise UserError(
            f"dependency={args.dependency}: launcher=bash runs at once; leave it out, or use sbatch"
        )
    if args.launcher == "bash" and args.nodes > 1 and "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            f"launcher=bash nodes={args.nodes}: without SLURM only this machine is there; use "
            "nodes=1, or call stool inside an allocation (salloc)"
        )


def import_script(script: str) -> ModuleType:
    if script.endswith(".py") or not all(part.isidentifier() for part in script.split(".")):
        path = os.path.relpath(script) if "/" in script else script
        parts = [part for part in re.split(r"[./]", path.removesuffix(".py")) if part]
        raise UserError(
            f"script={script}: is no module; name it as python -m does, e.g. "
            f"script={'.'.join(parts) or 'apps.LT2.train'}"
        )
    try:
        return importlib.import_module(script)
    except ModuleNotFoundError as error:
        if error.name and (script == error.name or script.startswith(error.name + ".")):
            raise UserError(
                f"script={script}: no such module (seen from {os.getcwd()}); name it as python -m "
                "does, e.g. script=apps.LT2.train"
            ) from None
        raise UserError(f"script={script}: cannot be imported: {error}") from None
    except (ImportError, SyntaxError) as error:
        raise UserError(f"script={script}: cannot be imported: {error}") from None
    except SystemExit as left:
        raise UserError(
            f"script={script}: ends with status {left.code} when it is imported; what it does "
            'belongs under if __name__ == "__main__"'
        ) from None


def read_run_args(args: StoolArgs, module: ModuleType) -> Any:
    """The script's options, checked as the script itself will check them."""
    run_args = parse_run_args(args, module)
    check = getattr(module, "validate_before_submit", None)
    if check is not None:
        check(run_args, args.nodes * args.ngpu)
    return run_args


def parse_run_args(args: StoolArgs, module: ModuleType) -> Any:
    # An evaluation script may import TrainArgs, too: what it defines itself goes first.
    named = [getattr(module, name, None) for name in ("TrainArgs", "EvalArgs")]
    named = [c for c in named if is_dataclass(c) and isinstance(c, type)]
    named.sort(key=lambda c: c.__module__ != module.__name__)
    options_class = named[0] if named else None
    if options_class is None:
        raise UserError(f"script={args.script}: has no TrainArgs or EvalArgs to check a config by")
    if not args.config:
        raise UserError("config is not set: name a YAML file, e.g. config=run.yaml")
    if isinstance(args.config, Mapping):
        run_args = parse_args(options_class, args.overrides, config=args.config)
    else:
        run_args = parse_args(options_class, [f"config={args.config}", *args.overrides])
    if not getattr(run_args, "dump_dir", None):
        raise UserError("dump_dir is empty: set it in the config, or behind `--`")
    return run_args


def code_root(script: str, module: ModuleType) -> Path:
    """The folder that `python -m script` is called from."""
    assert module.__file__, f"{script} has no file"
    return Path(module.__file__).resolve().parents[script.count(".")]


def plan_job(args: StoolArgs, module: ModuleType, run_args: Any) -> Job:
    dump_dir = Path(run_args.dump_dir).absolute()
    return Job(
        args=args,
        name=getattr(run_args, "name", "") or dump_dir.name,
        dump_dir=dump_dir,
        workdir=Path.cwd(),
        code=dump_dir / "code" if args.copy_code else code_root(args.script, module),
        python=find_environment_python(args.anaconda),
        time_limit=time_limit(args),
    )


def find_environment_python(anaconda: str) -> Path:
    if anaconda == "default":
        return Path(sys.executable)
    python = Path(anaconda).expanduser().absolute() / "bin" / "python"
    if not python.is_file():
        raise UserError(
            f"anaconda={anaconda}: no {python}; give the folder of a conda or virtual environment"
        )
    return python


def time_limit(args: StoolArgs) -> str:
    if args.time != -1:
        return str(args.time)
    if args.launcher != "sbatch" or shutil.which("sinfo") is None:
        return ""  # SLURM then gives the partition's default
    asked = ["sinfo", "--noheader", "--format=%l", f"--partition={args.partition}"]
    answer = subprocess.run(asked, capture_output=True, text=True)
    limits = answer.stdout.split()
    if answer.returncode == 0 and not limits:
        raise UserError(f"partition={args.partition}: SLURM has no such partition; see sinfo -s")
    return {"infinite": "UNLIMITED"}.get(limits[0], limits[0]) if limits else ""


def check_dump_dir(job: Job, inputs: Mapping[str, Path]) -> None:
    """Refuse a dump_dir that cannot be written, is in use, or may not be reused or renamed."""
    try:
        check_may_use(job, inputs)
    except OSError as error:
        raise UserError(f"dump_dir={job.dump_dir}: cannot be read ({error.strerror})") from None
    check_writable("dump_dir", job.dump_dir)
    check_unlocked("dump_dir", job.dump_dir)


def check_may_use(job: Job, inputs: Mapping[str, Path]) -> None:
    """Refuse a dump_dir with files, unless the run may continue in it or may rename it."""
    folder = job.dump_dir
    if is_free(folder):
        return
    if not folder.is_dir():
        raise UserError(f"dump_dir={folder}: is a file; name a folder")
    if job.args.override:
        check_not_read(folder, inputs)
    elif not job.args.dirs_exists_ok:
        raise UserError(
            f"dump_dir={folder}: exists; name another, continue its run with dirs_exists_ok=true, "
            "or rename it with override=true"
        )


def read_inputs(job: Job, module: ModuleType, run_args: Any) -> dict[str, Path]:
    """Map options to the paths that the run reads."""
    given = {"script": code_root(job.args.script, module), "anaconda": job.python}
    if not isinstance(job.args.config, Mapping):
        given["config"] = job.args.config
    given |= getattr(module, "input_paths", lambda run_args: {})(run_args)
    return {option: Path(path) for option, path in given.items() if path}


def check_not_read(folder: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse to rename a folder that contains an input of the new run."""
    for option, path in inputs.items():
        for place in (os.path.abspath, os.path.realpath):  # the path itself, and behind links
            if Path(place(path)).is_relative_to(place(folder)):
                raise UserError(
                    f"override=true dump_dir={folder}: would rename the folder that contains "
                    f"{option}={path}; name another dump_dir"
                )


def is_free(folder: Path) -> bool:
    """Whether the folder is missing, or holds nothing but a lock file."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name == LOCK_NAME for path in folder.iterdir())


# ---- what is written


def write_run(plan: RunPlan, without: Path | None = None) -> Path:
    """Write the run's folder and return the path of its submit.slurm.

    Leave `without`, by default the run's folder, out of the copied code.
    """
    folder = plan.job.dump_dir
    try:
        if plan.job.args.override and not is_free(folder):
            rename_old(folder)
        make_writable("dump_dir", folder)
        with lock_folders({"dump_dir": folder}):
            check_may_use(plan.job, {})  # another stool may have been faster
            return fill_run_folder(plan, without or folder)
    except OSError as error:
        if is_machine_fault(error):
            raise
        raise UserError(f"dump_dir={folder}: cannot be written: {error}") from None


def rename_old(folder: Path) -> None:
    """Rename the folder of an older run to a free name."""
    with lock_folders({"dump_dir": folder}):
        target = old_name(folder)
        folder.rename(target)
    print(f"stool: renamed {folder} to {target}", flush=True)


def old_name(folder: Path) -> Path:
    """Return the first free name of <folder>.old-1, <folder>.old-2, ..."""
    names = (folder.with_name(f"{folder.name}.old-{n}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def fill_run_folder(plan: RunPlan, without: Path) -> Path:
    job = plan.job
    if job.args.copy_code:
        copied = snapshot_code(plan.root, job.code, without=without)
        print(f"stool: {copied} files of code copied ({code_version(plan.root)})")
    (job.dump_dir / LOGS).mkdir(exist_ok=True)  # SLURM does not make it
    for name, text in run_files(plan).items():
        write_atomic(job.dump_dir / name, text)
    return job.script


def run_files(plan: RunPlan) -> dict[str, str]:
    """Name -> text of the files that make a run, its code aside; what relaunches it comes last."""
    given = plan.config  # comments included, where it is a file's text
    return {
        CODE_VERSION: version_record(plan.root),
        "base_config.yaml": given if isinstance(given, str) else config_as_yaml(given),
        plan.job.script.name: render_submit(plan.job),
    }
