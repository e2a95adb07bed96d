"""A job as stool is asked for it, and the submit.slurm that it comes to."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingua.errors import UserError

LAUNCHERS = ("sbatch", "bash")
CONFIG_ARGUMENT = 'config="$DUMP_DIR/base_config.yaml"'  # the options behind it win over the file


@dataclass
class StoolArgs:
    config: Any = None  # YAML file of the script's options (from Python also a mapping); required
    launcher: str = "sbatch"  # sbatch, or bash to run here or inside an allocation
    script: str = "apps.LT2.train"  # module to run, with a TrainArgs that says which options it has
    copy_code: bool = True  # run a copy of the code in dump_dir/code; false runs the code as it is
    dirs_exists_ok: bool = False  # launch into a dump_dir that exists, to go on with its run
    override: bool = False  # rename a dump_dir that exists to <dump_dir>.old-<n>, and start over
    dry_run: bool = False  # check all and show what would be written and run; nothing is touched
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
    dependency: str = ""  # jobs to wait for, as SLURM writes it (afterok:1234); not for relaunches
    # values to try of the script's options, sweep.optim.lr=[1e-4,3e-4]: every combination is a run,
    # in a folder of its own below dump_dir
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    # runs of a sweep at the same time; null is as many as SLURM has room for, or 1 with bash
    array: int | None = None
    stdout: bool = False  # true sends the output of all ranks to one place, false to a file a rank
    # what follows `--`: options of the script that win over its config
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise UserError(f"launcher={self.launcher}: use one of {', '.join(LAUNCHERS)}")
        for name in ("ngpu", "ncpu"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.array is not None and self.array < 1:
            raise UserError(f"array={self.array}: must be at least 1, or null")
        if self.array is not None and not self.sweep:
            raise UserError(
                f"array={self.array}: how many runs of a sweep go at the same time; name what to "
                "sweep, e.g. sweep.optim.lr=[1e-4,3e-4]"
            )
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

    @property
    def script(self) -> Path:
        return self.dump_dir / "submit.slurm"


def resources(job: Job) -> dict[str, Any]:
    """What sbatch is asked for, by the long names of its options."""
    args = job.args
    wanted = {
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
    }
    return {key: value for key, value in wanted.items() if value != ""}


def directives(job: Job) -> list[str]:
    logs = str(job.dump_dir / "logs").replace("%", "%%")
    files = {"output": f"{logs}/%j.stdout", "error": f"{logs}/%j.stderr"}
    options = {"job-name": job.name, **resources(job), **files}
    return [f"#SBATCH --{key}={quote_sbatch(value)}" for key, value in options.items()]


def quote_sbatch(value: Any) -> str:
    """As sbatch reads an argument: quotes and backslashes as in a shell, and no variables."""
    text = str(value)
    if not any(c.isspace() or c in "#'\"\\" for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def render_submit(job: Job) -> str:
    args, q = job.args, lambda value: shlex.quote(str(value))
    command = [
        args.script,
        CONFIG_ARGUMENT,
        *map(shlex.quote, args.overrides),
    ]
    run = "-m " + " ".join(command)
    rank_file = '"${logs//\\%/%%}/%j_%t'  # srun has patterns of its own for a % in the folder
    srun_files = "" if args.stdout else f' -o {rank_file}.out" -e {rank_file}.err"'
    files = "" if args.stdout else ' >>"$logs/run.out" 2>>"$logs/run.err"'
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {args.ngpu} "
    lines = [
        "#!/bin/bash",
        *directives(job),
        "",
        f"# Relaunch: sbatch {q(job.script)}",
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
