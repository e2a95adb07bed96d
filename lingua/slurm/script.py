"""The options of stool, and the submit.slurm that it writes from them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lingua.config.help import format_value
from lingua.errors import UserError

LAUNCHERS = ("sbatch", "bash")
SUBMIT_SCRIPT = "submit.slurm"
CONFIG_ARGUMENT = 'config="$DUMP_DIR/base_config.yaml"'  # later options win over the file


@dataclass
class StoolArgs:
    OTHER_OPTIONS: ClassVar = " Options of the run go after `--`."  # advice for unknown options
    config: Any = None  # YAML file with the script's options (in Python also a mapping); required
    launcher: str = "sbatch"  # sbatch, or bash to run here or inside an allocation
    script: str = "apps.LT2.train"  # module to run; its TrainArgs or EvalArgs defines the options
    copy_code: bool = True  # run a copy of the code in dump_dir/code; false runs the code in place
    dirs_exists_ok: bool = False  # launch into a dump_dir that exists, to continue its run
    override: bool = False  # rename a dump_dir that exists to <dump_dir>.old-<n>, and start over
    dry_run: bool = False  # check everything and show what would be written and run; write nothing
    nodes: int = -1  # machines; required with sbatch, 1 with bash
    # GPUs per node, with one process each; -1 = 8 with sbatch, and with bash those of this machine,
    # or one process on a CPU
    ngpu: int = -1
    ncpu: int = 16  # CPU cores per GPU
    mem: str = ""  # memory per node, in SLURM's format (200G); "" = all of it
    anaconda: str = "default"  # folder of the environment to run in; default = stool's own
    constraint: str = ""  # required node features, e.g. h100
    exclude: str = ""  # nodes not to use, e.g. node[3,7]
    time: int = -1  # limit in minutes; -1 = the partition's maximum
    account: str = ""  # SLURM account to charge
    qos: str = ""  # SLURM quality of service
    partition: str = ""  # SLURM partition; "" = the cluster's default
    dependency: str = ""  # jobs to wait for, in SLURM's format (afterok:1234); not for relaunches
    # lists of values of the script's options, e.g. sweep.optim.lr=[1e-4,3e-4]; each combination
    # is a run in its own folder below dump_dir
    sweep: dict[str, Any] = field(default_factory=dict)
    # runs of a sweep at the same time; null = no limit with sbatch, 1 with bash
    array: int | None = None
    # parameters (without embeddings) or flops: make the models of a sweep equal to the first
    match: str | None = None
    by: str = "n_layers"  # what match changes: n_layers | dim | ffn
    stdout: bool = False  # true prints the output of all ranks together, false uses a file per rank
    overrides: list[str] = field(default_factory=list)  # the options after `--`

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise UserError(f"launcher={self.launcher} must be one of {', '.join(LAUNCHERS)}")
        if self.launcher == "bash" and self.nodes == -1:
            self.nodes = 1
        if self.ncpu < 1:
            raise UserError(f"ncpu={self.ncpu} must be at least 1")
        if self.ngpu < 1 and self.ngpu != -1:
            raise UserError(f"ngpu={self.ngpu} must be at least 1, or -1 for the default")
        for option, values in self.sweep.items():
            if not isinstance(values, list):
                value = format_value(values)
                raise UserError(f"sweep.{option}={value} must be a list of values, e.g. [1, 2]")
        if self.array is not None and (self.array < 1 or not self.sweep):
            raise UserError(
                f"array={self.array} must be at least 1 and needs a sweep, e.g. "
                "sweep.optim.lr=[1e-4,3e-4]"
            )
        if self.match is not None and not self.sweep:
            raise UserError(
                f"match={self.match} needs a sweep; for other models use apps.LT2.describe"
            )
        if self.by != "n_layers" and self.match is None:
            raise UserError(f"by={self.by} needs match=parameters or match=flops")
        if self.time < 1 and self.time != -1:
            raise UserError(f"time={self.time} must be minutes, or -1 for the partition's maximum")


@dataclass(frozen=True)
class Job:
    """A run to launch. Paths are absolute."""

    args: StoolArgs
    name: str
    config: str  # YAML; the text of the user's file, if there is one
    dump_dir: Path
    workdir: Path  # where the job runs
    root: Path  # of the code that stool imports
    python: Path
    time_limit: str  # in SLURM's format; "" = the partition's default
    run_args: Any = None  # the options of the run

    @property
    def code(self) -> Path:
        """The root of the code that the job imports."""
        return self.dump_dir / "code" if self.args.copy_code else self.root

    @property
    def script(self) -> Path:
        return self.dump_dir / SUBMIT_SCRIPT


def resources(job: Job) -> dict[str, Any]:
    """Map sbatch's long options to their values, except the names of the job and its files."""
    args = job.args
    options = {
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
        "signal": "USR2@120",  # two minutes to save a checkpoint before the time limit
        "open-mode": "append",  # a requeued job appends to the same files
    }
    return {key: value for key, value in options.items() if value != ""}


def directives(job: Job) -> list[str]:
    logs = str(job.dump_dir / "logs").replace("%", "%%")
    files = {"output": f"{logs}/%j.stdout", "error": f"{logs}/%j.stderr"}
    options = {"job-name": job.name, **resources(job), **files}
    return [f"#SBATCH --{key}={quote_sbatch(value)}" for key, value in options.items()]


def quote_sbatch(value: Any) -> str:
    """Quote a value for sbatch, which reads quotes and backslashes but expands no variables."""
    text = str(value)
    if not any(c.isspace() or c in "#'\"\\" for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def render_submit(job: Job) -> str:
    """Write the text of submit.slurm."""
    args, q = job.args, lambda value: shlex.quote(str(value))
    run = " ".join(["-m", args.script, CONFIG_ARGUMENT, *map(shlex.quote, args.overrides)])
    rank_file = '"${logs//\\%/%%}/%j_%t'  # srun expands % in names
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
        "# PYTHONSAFEPATH: import the code from here, not from the working folder.",
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
    """Activate a conda environment if conda is there, because activation may set variables."""
    environment = python.parent.parent
    if not (environment / "conda-meta").is_dir():
        return []
    return [
        "if command -v conda >/dev/null; then",
        '    eval "$(conda shell.bash hook)"',
        f"    conda activate {shlex.quote(str(environment))}",
        "fi",
    ]
