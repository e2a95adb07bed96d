"""stool, the SLURM tool: check a config, keep the code it runs with, and submit the job.

    python -m lingua.stool script=apps.LT2.train config=run.yaml nodes=8 partition=gpu
    python -m lingua.stool config=run.yaml nodes=1 ngpu=1 launcher=bash -- steps=100 dump_dir=/tmp/x

Options before `--` are stool's own; those after it are the script's and win over the config. The
config is checked against the script's TrainArgs before anything is written; a script may check more
by a function `validate_before_submit(args, world_size)`. Then `dump_dir` gets

    code/               what git tracks or does not ignore; the job runs this copy
    code_version.json   the commit, and whether files differed from it
    base_config.yaml    the config as it was given
    submit.slurm        relaunches the run: sbatch submit.slurm, or bash submit.slurm without SLURM
    logs/               stdout and stderr of each rank

The job runs in the folder stool was called from, so that relative paths keep their meaning.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lingua.args import (
    UserError,
    dataclass_from_dict,
    dump_config,
    parse_args,
    run_cli,
    write_atomic,
)
from lingua.code_snapshot import snapshot_code, write_code_version
from lingua.run_folder import make_writable

logger = logging.getLogger()

LAUNCHERS = ("sbatch", "bash")
RUN_MARKS = ("base_config.yaml", "config.yaml", "submit.slurm")  # what tells a run's folder


@dataclass
class StoolArgs:
    config: Any = None  # YAML file of the script's options (from Python also a mapping); required
    launcher: str = "sbatch"  # sbatch, or bash to run here or inside an allocation
    script: str = "apps.LT2.train"  # module to run, with a TrainArgs that says which options it has
    copy_code: bool = True  # run a copy of the code in dump_dir/code; false runs the code as it is
    dirs_exists_ok: bool = False  # launch into a dump_dir that exists, to go on with its run
    override: bool = False  # delete a dump_dir that exists, checkpoints included, and start anew
    nodes: int = -1  # machines; required
    ngpu: int = 8  # GPUs on each node, one process each
    ncpu: int = 16  # CPU cores for each GPU
    mem: str = ""  # memory of each node, as SLURM writes it (200G); "" = all of it
    anaconda: str = "default"  # folder of the environment to run in; default = the one stool is in
    constraint: str = ""  # node features that SLURM must give, e.g. h100
    exclude: str = ""  # nodes not to use, e.g. node[3,7]
    time: int = -1  # limit in minutes; -1 = the longest that the partition allows
    account: str = ""  # SLURM account to charge
    qos: str = ""  # SLURM quality of service
    partition: str = "learn"  # SLURM partition
    stdout: bool = False  # true sends the output of all ranks to one place, false to a file a rank
    # what follows `--`: options of the script that win over its config
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise UserError(f"launcher={self.launcher}: use one of {', '.join(LAUNCHERS)}")
        for name in ("ngpu", "ncpu"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.time != -1 and self.time < 1:
            raise UserError(
                f"time={self.time}: must be a number of minutes, or -1 for the partition's limit"
            )


@dataclass(frozen=True)
class Job:
    """All that submit.slurm is made of; every path is absolute."""

    args: StoolArgs
    name: str
    dump_dir: Path
    workdir: Path  # where the job runs
    code: Path  # the code it runs
    python: Path
    time_limit: str  # as SLURM writes it; "" = leave it to SLURM


def launch_job(args: StoolArgs) -> Path:
    """Check, write and launch a run; the path of its submit.slurm. `args` is not changed."""
    if args.nodes < 1:
        raise UserError(f"nodes={args.nodes}: say on how many machines to run, e.g. nodes=1")
    check_launcher(args)
    module = import_script(args.script)
    run_args = read_run_args(args, module)
    job = plan_job(args, module, run_args)
    config = args.config if isinstance(args.config, Mapping) else Path(args.config).read_text()
    prepare_dump_dir(job)  # may delete the file that the config came from
    write_run(job, config, code_root(args.script, module))
    submit(job)
    return job.dump_dir / "submit.slurm"


# ---- checks, before anything is written


def check_launcher(args: StoolArgs) -> None:
    if args.launcher == "sbatch" and shutil.which("sbatch") is None:
        raise UserError(
            "launcher=sbatch: there is no sbatch on this machine; log in to the cluster, or use "
            "launcher=bash to run here"
        )
    if args.launcher == "bash" and args.nodes > 1 and "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            f"launcher=bash nodes={args.nodes}: without SLURM only this machine is there; use "
            "nodes=1, or call stool inside an allocation (salloc)"
        )


def import_script(script: str) -> ModuleType:
    try:
        return importlib.import_module(script)
    except ModuleNotFoundError as error:
        if error.name and (script == error.name or script.startswith(error.name + ".")):
            raise UserError(
                f"script={script}: no such module (seen from {os.getcwd()}); name it as python -m "
                "does, e.g. script=apps.LT2.train"
            ) from None
        raise


def read_run_args(args: StoolArgs, module: ModuleType) -> Any:
    """The script's options, checked as the script itself will check them."""
    # An evaluation script may import TrainArgs, too: what it defines itself goes first.
    named = [c for c in (getattr(module, n, None) for n in ("TrainArgs", "EvalArgs")) if c]
    named.sort(key=lambda c: c.__module__ != module.__name__)
    options_class = named[0] if named else None
    if options_class is None:
        raise UserError(f"script={args.script}: has no TrainArgs or EvalArgs to check a config by")
    if not args.config:
        raise UserError("config is not set: name a YAML file, e.g. config=run.yaml")
    if isinstance(args.config, Mapping):
        if args.overrides:
            raise UserError("overrides: put them into the mapping that config is")
        run_args = dataclass_from_dict(options_class, args.config)
    else:
        run_args = parse_args(options_class, [f"config={args.config}", *args.overrides])
    if not getattr(run_args, "dump_dir", None):
        raise UserError("dump_dir is empty: set it in the config, or behind `--`")
    check = getattr(module, "validate_before_submit", None)
    if check is not None:
        check(run_args, args.nodes * args.ngpu)
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


# ---- what is written


def prepare_dump_dir(job: Job) -> None:
    """An empty dump_dir, or one that may be used as it is; anything else is left alone."""
    folder = job.dump_dir
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise UserError(f"dump_dir={folder}: is a file; name a folder")
    if job.args.override:
        in_use = [job.workdir, Path.home(), Path(__file__).resolve()]
        if any(path.is_relative_to(folder.resolve()) for path in in_use):
            raise UserError(f"override=true dump_dir={folder}: holds more than a run; not deleted")
        if not any((folder / mark).exists() for mark in RUN_MARKS):
            raise UserError(
                f"override=true dump_dir={folder}: does not look like a run (none of "
                f"{', '.join(RUN_MARKS)} in it); delete it yourself or name another"
            )
        shutil.rmtree(folder)
    elif not job.args.dirs_exists_ok:
        raise UserError(
            f"dump_dir={folder}: exists; name another, go on with it by dirs_exists_ok=true, "
            "or delete it by override=true"
        )


def write_run(job: Job, config: str | Mapping[str, Any], root: Path) -> None:
    make_writable("dump_dir", job.dump_dir)
    (job.dump_dir / "logs").mkdir(exist_ok=True)  # SLURM does not make it
    version = write_code_version(root, job.dump_dir / "code_version.json")
    if job.args.copy_code:
        copied = snapshot_code(root, job.code, without=job.dump_dir)
        changed = ", with changes" if version.dirty else ""
        commit = f"commit {version.commit[:10]}{changed}" if version.commit else "not in git"
        print(f"stool: {copied} files of code copied ({commit})")
    base_config = job.dump_dir / "base_config.yaml"
    if isinstance(config, str):
        write_atomic(base_config, config)  # as it was given, comments included
    else:
        dump_config(config, base_config, log_config=False)
    write_atomic(job.dump_dir / "submit.slurm", render_submit(job))


def directives(job: Job) -> list[str]:
    args, logs = job.args, str(job.dump_dir / "logs").replace("%", "%%")
    wanted = {
        "job-name": job.name,
        "nodes": args.nodes,
        "gres": f"gpu:{args.ngpu}",
        "cpus-per-gpu": args.ncpu,
        "mem": args.mem or "0",
        "time": job.time_limit,
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": args.constraint,
        "exclude": args.exclude,
        "distribution": "block",
        "signal": "USR2@120",  # two minutes before the end every rank may save
        "open-mode": "append",  # a requeued job goes on in the same files
        "output": f"{logs}/%j.stdout",
        "error": f"{logs}/%j.stderr",
    }
    return [f"#SBATCH --{key}={quote_sbatch(v)}" for key, v in wanted.items() if v != ""]


def quote_sbatch(value: Any) -> str:
    text = str(value)
    return f'"{text}"' if any(c.isspace() or c == "#" for c in text) else text


def render_submit(job: Job) -> str:
    args, q = job.args, lambda value: shlex.quote(str(value))
    command = [
        args.script,
        'config="$DUMP_DIR/base_config.yaml"',
        *map(shlex.quote, args.overrides),
    ]
    run = "-m " + " ".join(command)
    srun_files = "" if args.stdout else ' -o "$logs/%j_%t.out" -e "$logs/%j_%t.err"'
    files = "" if args.stdout else ' >>"$logs/run.out" 2>>"$logs/run.err"'
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {args.ngpu} "
    lines = [
        "#!/bin/bash",
        *directives(job),
        "",
        f"# Relaunch: sbatch {q(job.dump_dir / 'submit.slurm')}",
        "set -eo pipefail",
        f"export DUMP_DIR={q(job.dump_dir)}",
        "export OMP_NUM_THREADS=1",
        *activate_conda(job.python),
        "# PYTHONSAFEPATH: the code is taken from here, not from the folder the job runs in.",
        f"export PYTHONPATH={q(job.code)}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        f"cd {q(job.workdir)}",
        "",
        'if [[ -n "${SLURM_JOB_ID:-}" ]]; then',
        "    export LAUNCH_WITH=SBATCH",
        "    logs=$DUMP_DIR/logs/$SLURM_JOB_ID",
        '    mkdir -p "$logs"',
        f"    srun{srun_files} -n {args.nodes * args.ngpu} -N {args.nodes} \\",
        f"        {q(job.python)} -u {run}",
        "else",
        "    logs=$DUMP_DIR/logs/local",
        '    mkdir -p "$logs"',
        f"    exec {q(job.python)} -u {torchrun if args.ngpu > 1 else ''}{run}{files}",
        "fi",
    ]
    return "\n".join(lines) + "\n"


def activate_conda(python: Path) -> list[str]:
    """Conda environments may set variables on activation; without conda, their Python does."""
    environment = python.parent.parent
    if not (environment / "conda-meta").is_dir():
        return []
    return [
        "if command -v conda >/dev/null; then",
        '    eval "$(conda shell.bash hook)"',
        f"    conda activate {shlex.quote(str(environment))}",
        "fi",
    ]


# ---- launching


def submit(job: Job) -> None:
    script = job.dump_dir / "submit.slurm"
    print(f"stool: {job.args.launcher} {shlex.quote(str(script))}", flush=True)
    done = subprocess.run([job.args.launcher, str(script)])
    if done.returncode != 0:
        raise UserError(
            f"{job.args.launcher} {script}: ended with status {done.returncode}; its messages are "
            f"above or in {job.dump_dir / 'logs'}"
        )


def main(argv: list[str]) -> None:
    split = argv.index("--") if "--" in argv else len(argv)
    args = parse_args(
        StoolArgs,
        argv[:split],
        prog="python -m lingua.stool",
        description=(__doc__ or "").partition("\n\n")[0],
        examples=[
            "python -m lingua.stool config=run.yaml nodes=8 partition=gpu",
            "python -m lingua.stool config=run.yaml nodes=1 ngpu=1 launcher=bash -- steps=100",
        ],
    )
    launch_job(replace(args, overrides=[*args.overrides, *argv[split + 1 :]]))


if __name__ == "__main__":
    run_cli(main)
