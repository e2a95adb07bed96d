"""Run jobs in the background: in SLURM with submitit, or as processes of this machine.

A job runs its submit.slurm, as sbatch or bash would. submitit adds one SLURM job array for several
jobs, and a handle that knows how each job ended. Its logs and pickled commands are in a separate
folder.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lingua.errors import UserError, import_optional
from lingua.slurm.script import Job, StoolArgs, resources

FOLDER = "submitit"  # below the folder of a run or a sweep
GPUS_PER_NODE = 8


def import_submitit(needed_by: str) -> Any:
    return import_optional("submitit", extra="slurm", needed_by=needed_by)


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


# ---- in SLURM


def check_slurm(job: Job) -> None:
    if not has_slurm():
        raise UserError("launcher=sbatch: this machine has no sbatch or srun; use launcher=bash")
    if not job.time_limit:  # submitit's default is five minutes
        raise UserError("time=-1: sinfo does not show the partition's maximum; set time=MINUTES")


def submit_to_slurm(
    jobs: Sequence[Job], folder: Path, *, name: str, at_once: int | None = None
) -> list[Any]:
    """Submit jobs of equal resources and return submitit's handles. Several are a job array."""
    submitit = import_submitit("submitting to SLURM in the background")
    options = resources(jobs[0])
    assert "time" in options, "check_slurm comes first"
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(
        job_name=name,
        nodes=options.pop("nodes"),
        array_parallelism=at_once or len(jobs),
        dependency=jobs[0].args.dependency or None,
        use_srun=False,  # submit.slurm calls srun
        wckey=None,  # submitit's default is a name that a cluster may not know
        additional_parameters=options,
    )
    try:
        with executor.batch():
            return [executor.submit(_command(job)) for job in jobs]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"sbatch: {str(error).strip()}") from None


# ---- on this machine


class LocalProcess:
    """A job that runs as a process of this machine, on the GPUs `gpus`.

    `gpus` is its CUDA_VISIBLE_DEVICES; None keeps the variable unchanged. A `detached` process gets
    no signals of this terminal and may outlive this process.
    """

    def __init__(self, job: Job, gpus: str | None = None, *, detached: bool = False):
        self.output = LocalOutput(job)
        self.output.err.parent.mkdir(parents=True, exist_ok=True)
        variables = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
        with open(self.output.err, "ab") as err:  # for errors before the run itself writes there
            self._process = subprocess.Popen(
                run_command(job),
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=err,
                stderr=err,
                start_new_session=detached,
            )

    def status(self) -> int | None:
        """Return the exit status of a finished process, else None."""
        return self._process.poll()

    def done(self) -> bool:
        return self.status() is not None

    def failure(self) -> str | None:
        """Return the error of a finished process, or None if it succeeded."""
        status = self.status()
        if not status:
            return None
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return self.output.explain() or f"ended with status {status}"

    def terminate(self) -> None:
        self._process.terminate()


def visible_gpus() -> list[str]:
    """List this process's usable GPUs as CUDA_VISIBLE_DEVICES names them."""
    import torch  # takes seconds, and other commands of stool don't need it

    # device_count asks the driver, which also lists GPUs that CUDA can't use.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count]


def fill_in_ngpu(args: StoolArgs, at_once: int = 1) -> StoolArgs:
    """Return `args` with the default of ngpu. `at_once` runs share the GPUs of this machine."""
    if args.ngpu != -1:
        return args
    if args.launcher == "sbatch":
        return replace(args, ngpu=GPUS_PER_NODE)
    # A login node has none of the allocation's GPUs.
    in_allocation = os.environ.get("SLURM_GPUS_ON_NODE", "")
    count = int(in_allocation) if in_allocation.isdecimal() else len(visible_gpus())
    return replace(args, ngpu=max(1, count // at_once))


def gpu_slots(ngpu: int, at_once: int) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES for each of `at_once` jobs; None keeps it unchanged."""
    gpus = visible_gpus()
    if at_once == 1 or not gpus:
        return [None] * at_once
    if len(gpus) < ngpu * at_once:
        raise UserError(
            f"array={at_once} ngpu={ngpu}: needs {ngpu * at_once} GPUs, but this machine has "
            f"{len(gpus)}; use array={max(1, len(gpus) // ngpu)}"
        )
    return [",".join(gpus[i * ngpu : (i + 1) * ngpu]) for i in range(at_once)]


# ---- handles and output


def failure(handle: Any) -> str | None:
    """Return the error of a finished job, or where to look; None if it succeeded."""
    if isinstance(handle, LocalProcess):
        return handle.failure() and f"{handle.failure()}; see {handle.output.err}"
    return None if handle.exception() is None else f"see {handle.paths.stderr}"


def run_command(job: Job) -> list[str]:
    return ["bash", str(job.script)]


def _command(job: Job) -> Any:
    # A class of submitit, because the job unpickles it and may not find this package.
    submitit = import_submitit("a job in the background")
    return submitit.helpers.CommandFunction(run_command(job), verbose=False)


MAX_SHOWN = 300  # characters

# torchrun's own report comes after the error of the rank
ERROR = re.compile(r"(\[rank\d+\]: )?(error: \S|[\w.]*(Error|Exception|Fault)(: |$))")
# what the other ranks report when one is gone
CONSEQUENCE = re.compile(r"Connection (closed|reset)|ncclRemoteError|remote process exited")


# how lingua.logger writes a warning
WARNING = re.compile(r"(?:\d+: )?WARNING +[\d-]+ [\d:.]+ - (?:\d+ days?, )?[\d:]+ - (.*)")


class LocalOutput:
    """The files run.out and run.err in logs/local, to which submit.slurm appends.

    Reads only what was written since this object was made.
    """

    def __init__(self, job: Job):
        logs = job.dump_dir / "logs" / "local"
        self.out, self.err = logs / "run.out", logs / "run.err"
        self._start = self.err.stat().st_size if self.err.exists() else 0

    def _lines(self) -> list[str]:
        data = self.err.read_bytes()[self._start :] if self.err.exists() else b""
        return [line.strip() for line in data.decode("utf-8", "replace").splitlines()]

    def explain(self) -> str:
        """Return the line of run.err that explains a failure, or ""."""
        lines = [line for line in self._lines() if re.search(r"\w", line)]
        errors = [line for line in lines if ERROR.match(line)]
        causes = [line for line in errors if not CONSEQUENCE.search(line)]
        best = causes or errors or lines
        return best[-1][:MAX_SHOWN] if best else ""

    def warnings(self) -> list[str]:
        """Return each logged warning once."""
        return list(dict.fromkeys(m[1] for line in self._lines() if (m := WARNING.match(line))))
