"""Jobs that go on by themselves, by submitit: in SLURM, or as processes of this machine.

What a job runs is the submit.slurm that stool wrote, as sbatch and bash would; what submitit adds
is one SLURM job array for many of them, a handle that knows how each ended, and the same without
SLURM. Its files (logs, pickled commands and results) lie in a folder of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lingua.errors import UserError, import_optional
from lingua.slurm.script import Job, resources

FOLDER = "submitit"  # below a run's or a sweep's
TEN_YEARS = 10 * 365 * 24 * 60  # minutes: submitit's processes have a limit, ours do not
POLL_SECONDS = 0.2


def import_submitit(needed_by: str) -> Any:
    return import_optional("submitit", extra="slurm", needed_by=needed_by)


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


# ---- in SLURM


def check_slurm(job: Job) -> None:
    """Refuse what submitit could not submit, before anything is written."""
    if not has_slurm():
        raise UserError("launcher=sbatch: there is no srun on this machine; use launcher=bash")
    if not job.time_limit:  # submitit would write a limit of five minutes
        raise UserError("time=-1: sinfo does not tell the partition's limit; set time=MINUTES")


def submit_to_slurm(
    jobs: Sequence[Job], folder: Path, *, name: str, at_once: int | None = None
) -> list[Any]:
    """Submit jobs of equal resources, as a job array if they are several; submitit's handles."""
    submitit = import_submitit("submitting to SLURM in the background")
    options = resources(jobs[0])
    assert "time" in options, "check_slurm comes before"
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(
        job_name=name,
        nodes=options.pop("nodes"),
        array_parallelism=at_once or len(jobs),
        dependency=jobs[0].args.dependency or None,
        use_srun=False,  # submit.slurm has its own
        wckey=None,  # submitit's name, which a cluster may not know
        additional_parameters=options,
    )
    try:
        with executor.batch():
            return [executor.submit(_command(job)) for job in jobs]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"sbatch: {str(error).strip()}") from None


# ---- on this machine


def start_here(job: Job, folder: Path, *, gpus: str | None = None) -> Any:
    """Start a job in a process of its own, which outlives this one; submitit's handle.

    `gpus` is its CUDA_VISIBLE_DEVICES; None leaves that as it is.
    """
    submitit = import_submitit("running in the background")
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(timeout_min=TEN_YEARS)
    if gpus is None:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    # submitit sets the variable, so that it has to be set, or unset, behind it.
    visible = ["-u", "CUDA_VISIBLE_DEVICES"] if gpus is None else [f"CUDA_VISIBLE_DEVICES={gpus}"]
    return executor.submit(_command(job, "env", *visible))


def run_here(
    jobs: Sequence[Job], folder: Path, *, at_once: int, when_done: Callable[[Job, Any], None]
) -> None:
    """Run jobs, `at_once` of them at a time, each on GPUs of its own; returns when all are done.

    `when_done` is called with each job and its handle, as they end.
    """
    slots = gpu_slots(jobs[0].args.ngpu, at_once)
    waiting, running = list(jobs), {}
    while waiting or running:
        for slot, gpus in enumerate(slots):
            if slot in running and running[slot][1].done():
                when_done(*running.pop(slot))
            if slot not in running and waiting:
                job = waiting.pop(0)
                running[slot] = (job, start_here(job, folder, gpus=gpus))
        time.sleep(POLL_SECONDS)


def visible_gpus() -> list[str]:
    """This process's GPUs, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # takes seconds: the other commands of stool do without

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count]


def gpu_slots(ngpu: int, at_once: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each of `at_once` jobs; None where it may stay as it is."""
    gpus = visible_gpus()
    if at_once == 1 or not gpus:
        return [None] * at_once
    if len(gpus) < ngpu * at_once:
        raise UserError(
            f"array={at_once} ngpu={ngpu}: this machine has {len(gpus)} GPUs, and runs at the same "
            f"time need {ngpu * at_once}; use array={max(1, len(gpus) // ngpu)}"
        )
    return [",".join(gpus[i * ngpu : (i + 1) * ngpu]) for i in range(at_once)]


# ---- handles


def failure(handle: Any) -> str | None:
    """Why a job failed that is done; None if it did not."""
    error = handle.exception()
    return None if error is None else f"see {handle.paths.stderr}"


def run_command(job: Job) -> list[str]:
    return ["bash", str(job.script)]


def _command(job: Job, *before: str) -> Any:
    # submitit's own class, since the job unpickles it where this package may not be on the path.
    submitit = import_submitit("a job in the background")
    return submitit.helpers.CommandFunction([*before, *run_command(job)], verbose=False)


MAX_READ = 2**16  # bytes at the end of a file


MAX_LENGTH = 300  # characters of a line that is shown


# torchrun ends with a report of its own, behind the error of the rank
ERROR = re.compile(r"(\[rank\d+\]: )?(error: \S|[\w.]*(Error|Exception|Fault)(: |$))")


# what other ranks say when one is gone
FOLLOWS = re.compile(r"Connection (closed|reset)|ncclRemoteError|remote process exited")


RULE = re.compile(r"[-=\s]*")


class LocalOutput:
    """logs/local/run.out and run.err, to which submit.slurm appends at each start."""

    def __init__(self, job: Job):
        logs = job.dump_dir / "logs" / "local"
        self.out, self.err = logs / "run.out", logs / "run.err"
        self._begin = size_of(self.err)

    def last_error(self) -> str | None:
        """What run.err says since this object was made, in a line; None if it says nothing."""
        end = size_of(self.err)
        if end <= self._begin:
            return None
        with open(self.err, "rb") as file:
            file.seek(max(self._begin, end - MAX_READ))
            lines = file.read().decode("utf-8", "replace").splitlines()
        said = [line.strip() for line in lines if not RULE.fullmatch(line)]
        errors = [line for line in said if ERROR.match(line)]
        causes = [line for line in errors if not FOLLOWS.search(line)]
        last = (causes or errors or said or [""])[-1]
        return last if len(last) <= MAX_LENGTH else f"{last[:MAX_LENGTH]} ..."


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def local_output(job: Job) -> LocalOutput | None:
    """None where its output goes elsewhere: to stool's, or to files of SLURM's ranks."""
    is_local = not job.args.stdout and not os.environ.get("SLURM_JOB_ID")
    return LocalOutput(job) if job.args.launcher == "bash" and is_local else None
