"""From what stool is asked for to a run's folder: all is checked before anything is written."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lingua.args import config_as_yaml, parse_args
from lingua.errors import UserError, is_machine_fault
from lingua.files.atomic import write_atomic
from lingua.files.lock import LOCK_NAME, check_writable, find_holder, hold_folders, make_writable
from lingua.slurm.code import CODE_VERSION, code_version, snapshot_code, version_record
from lingua.slurm.script import Job, StoolArgs, render_submit

RUN_MARKS = ("base_config.yaml", "config.yaml", "submit.slurm")  # what tells a run's folder
OWN_MARKS = ("base_config.yaml", "submit.slurm")  # of these no other program makes one
LOGS = "logs"


@dataclass(frozen=True)
class RunPlan:
    """A run that may be written."""

    job: Job
    config: str | Mapping[str, Any]  # as it was given: the text of a YAML file, or a mapping
    root: Path  # of the code
    reads: Sequence[tuple[str, Path]]  # (option, file or folder)


def plan_run(args: StoolArgs) -> RunPlan:
    """Check all that can be checked; a mistake is a UserError, and nothing was written."""
    if args.nodes < 1:
        raise UserError(f"nodes={args.nodes}: say on how many machines to run, e.g. nodes=1")
    module = import_script(args.script)
    run_args = read_run_args(args, module)
    check_launcher(args)
    job = plan_job(args, module, run_args)
    reads = paths_read(job, module, run_args)
    check_dump_dir(job, reads)
    # Read now: the folder that is deleted may hold it.
    is_given = isinstance(args.config, Mapping)
    config = args.config if is_given else Path(args.config).read_text(encoding="utf-8")
    return RunPlan(job, config, code_root(args.script, module), reads)


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


def paths_read(job: Job, module: ModuleType, run_args: Any) -> list[tuple[str, Path]]:
    """(option, path) of what the job needs and may be there already."""
    by_script = getattr(module, "paths_read", lambda run_args: [])(run_args)
    return [
        ("script", code_root(job.args.script, module)),
        ("script", Path(str(module.__file__))),
        ("anaconda", job.python),
        ("anaconda", job.python.parent),  # its python is a link
        *by_script,
    ]


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


def check_dump_dir(job: Job, reads: Iterable[tuple[str, Path]]) -> None:
    """Refuse a dump_dir that cannot be written or that a run holds, and see check_may_use."""
    folder = job.dump_dir
    for option, text in (("dump_dir", str(folder)), ("name", job.name)):
        if not text.isprintable():  # a line of submit.slurm would end in it
            raise UserError(f"{option}={text!r}: has a line break, or such; use plain characters")
    try:
        check_may_use(job, reads)
        check_writable("dump_dir", folder)
        check_not_held(job)
    except OSError as error:
        raise UserError(f"dump_dir={folder}: cannot be looked into ({error.strerror})") from None


def check_may_use(job: Job, reads: Iterable[tuple[str, Path]]) -> None:
    """Refuse a dump_dir that holds something, unless it may be used as it is, or deleted."""
    folder = job.dump_dir
    if is_free(folder):
        return
    if not folder.is_dir():
        raise UserError(f"dump_dir={folder}: is a file; name a folder")
    if job.args.override:
        check_may_delete(folder, [job.workdir, Path.home(), Path(__file__).resolve()])
        check_not_read([folder], reads)
    elif not job.args.dirs_exists_ok:
        raise UserError(
            f"dump_dir={folder}: exists; name another, go on with it by dirs_exists_ok=true, "
            "or delete it by override=true"
        )


def check_may_delete(folder: Path, in_use: Sequence[Path]) -> None:
    option = f"override=true dump_dir={folder}"
    if any(path.is_relative_to(folder.resolve()) for path in in_use):
        raise UserError(f"{option}: holds more than a run; not deleted")
    if not any((folder / mark).exists() for mark in OWN_MARKS):
        raise UserError(
            f"{option}: does not look like a run (none of {', '.join(OWN_MARKS)} in it); delete it "
            "yourself or name another"
        )
    for below in folders_in(folder):
        # half a deletion helps nobody
        if not os.access(below, os.R_OK | os.W_OK | os.X_OK):
            raise UserError(f"{option}: {below} may not be written, and so not be deleted")
        if (below / ".git").exists():
            raise UserError(f"{option}: {below} is a git repository; not deleted")
        if below != folder and is_trained(below):
            raise UserError(f"{option}: {below} is another run; not deleted")


def is_trained(folder: Path) -> bool:
    """Whether it is a run's, and not that of an evaluation, which a run may have below."""
    return (folder / "checkpoints").exists() and any((folder / m).exists() for m in OWN_MARKS)


def check_not_read(folders: Sequence[Path], reads: Iterable[tuple[str, Path]]) -> None:
    """Refuse to delete the folders where one holds what is read: its name, or, behind links, what
    that leads to."""
    places = [(folder, os.path.abspath(folder), os.path.realpath(folder)) for folder in folders]
    for path, option in {path: option for option, path in reads}.items():
        named, behind_links = Path(os.path.abspath(path)), Path(os.path.realpath(path))
        for folder, name, place in places:
            if named.is_relative_to(name) or behind_links.is_relative_to(place):
                raise UserError(
                    f"override=true dump_dir={folder}: would delete what {option} reads ({path}); "
                    "name another dump_dir"
                )


def folders_in(folder: Path) -> Iterator[Path]:
    """The folder and those below it, one that may not be looked into among them; no links."""
    yield folder
    for parent, names, _ in os.walk(folder):
        below = (Path(parent, name) for name in names)
        yield from (path for path in below if not path.is_symlink())


def check_not_held(job: Job) -> None:
    """Refuse to delete, or to put other code and another config under, a run that goes on."""
    holder = find_holder(job.dump_dir)
    if holder is None:
        return
    option = "override" if job.args.override else "dirs_exists_ok"
    said = f"{option}=true dump_dir={job.dump_dir}:"
    if holder.is_certain:
        submit = shlex.quote(str(job.script))
        raise UserError(
            f"{said} a run writes to {holder.folder} ({holder.who}); wait for it, stop it, or name "
            f"another folder (a job that goes on after it: sbatch --dependency=afterany:<its id> "
            f"{submit})"
        )
    if job.args.override:
        raise UserError(
            f"{said} there is no telling whether a run still writes to {holder.folder} (the last: "
            f"{holder.who}), as its {LOCK_NAME} cannot be locked here; delete the folder yourself "
            "or name another"
        )


def is_free(folder: Path) -> bool:
    """Whether nothing is there, or nothing but what a process that held it has left."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name == LOCK_NAME for path in folder.iterdir())


# ---- what is written


def write_run(plan: RunPlan, without: Path | None = None) -> Path:
    """The run's folder; the path of its submit.slurm. `without` is no part of the code, nor is the
    folder itself."""
    make_writable("dump_dir", plan.job.dump_dir)
    with hold_folders({"dump_dir": plan.job.dump_dir}):
        check_may_use(plan.job, plan.reads)  # another stool may have been faster
        try:
            if plan.job.args.override:
                empty_run_folder(plan.job.dump_dir)
            return fill_run_folder(plan, without or plan.job.dump_dir)
        except OSError as error:
            if is_machine_fault(error):
                raise
            raise UserError(f"dump_dir={plan.job.dump_dir}: cannot be written: {error}") from None


def empty_run_folder(folder: Path) -> None:
    """Delete a run, but for its lock, which is held meanwhile.

    What tells a run goes last: a deletion that is cut off can be asked for again.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name in OWN_MARKS):
        if path.name == LOCK_NAME:
            continue
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            raise UserError(
                f"override=true dump_dir={folder}: {path} cannot be deleted ({error.strerror})"
            ) from None


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
