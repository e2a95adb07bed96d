"""The runs of a study: processes of this machine that share its GPUs, within a time limit."""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lingua.dataloader.prefetch import hidden_main
from lingua.errors import run_cli
from lingua.files.atomic import write_atomic
from lingua.parallel.torchrun import PR_SET_PDEATHSIG
from lingua.slurm.background import LocalOutput, LocalProcess
from lingua.slurm.local_sweep import LocalSweep, SweepRun
from lingua.slurm.script import Job

SCRIPT = "apps.LT2.train"
RECORD_SECONDS = 10  # between two records of the time

Then = Callable[[str], tuple[Job, float] | None]


class ForkedProcess(LocalProcess):
    """A run in a fork of a process that has imported the libraries, which takes seconds.

    A fork of this process is safe without a GPU: it has started no thread and no backward. With a
    GPU, a server that only imports is forked. The run saves and ends if that process dies.
    """

    def __init__(self, job: Job, gpus: str | None):
        self.output = LocalOutput(job)
        self.output.err.parent.mkdir(parents=True, exist_ok=True)
        context: Any = multiprocessing.get_context("fork" if gpus is None else "forkserver")
        if gpus is not None:  # a fork would pass this to its own server, for data workers
            context.set_forkserver_preload([SCRIPT, __name__])
        argv = [f"config={job.dump_dir / 'base_config.yaml'}", *job.args.overrides]
        files = (str(self.output.out), str(self.output.err))
        variables = {"DUMP_DIR": str(job.dump_dir)}
        variables |= {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
        self._process = context.Process(target=run_job, args=(argv, files, variables))
        with hidden_main():
            self._process.start()

    def status(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        """End the run at once. It resumes from its last checkpoint."""
        self._process.kill()


def run_job(argv: list[str], files: tuple[str, str], variables: Mapping[str, str]) -> None:
    """Train in a forked process, as a separate command would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # the second of two SIGTERM would not save
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR2, 0, 0, 0)
    for descriptor, name in enumerate(files, start=1):
        with open(name, "ab") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not rich's, which draw the progress
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]  # a run that stops must not requeue the job of the study
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.argv = [SCRIPT, *argv]
    run_cli(importlib.import_module(SCRIPT).main)


class StudySweep(LocalSweep):
    """Runs of a study, which may share a GPU. Records the seconds spent.

    `stop_at` and `kill_at` are times: runs stop with a checkpoint, and those in a long step are
    killed. `then` returns the job after a run that is done, by its label, and the cost of a step.
    `result` returns what to print when a run ends, by its label, or "" for its losses.
    """

    program = "study"
    to_resume = "the same command resumes them"

    def __init__(self, jobs: Sequence[Job], at_once: int, costs: Sequence[float], **own: Any):
        self.stop_at, self.kill_at = own["stop_at"], own["kill_at"]
        self.gpus: list[str] = own["gpus"]
        self.record, self.file = own["record"], own["file"]
        self.then: Then | None = own.get("then")
        self.result_of: Callable[[str], str] | None = own.get("result")
        self.recorded = time.monotonic()
        super().__init__(jobs, at_once, costs)

    def find_slots(self, ngpu: int, at_once: int) -> list[str | None]:
        return [self.gpus[i % len(self.gpus)] if self.gpus else None for i in range(at_once)]

    def start(self, job: Job, gpus: str | None) -> LocalProcess:
        return ForkedProcess(job, gpus)

    def follow(self, run: SweepRun) -> tuple[Job, float] | None:
        return None if self.then is None else self.then(run.label)

    def result(self, run: SweepRun) -> str:
        return (self.result_of and self.result_of(run.label)) or super().result(run)

    def check_time(self) -> None:
        now = time.monotonic()
        self.is_out_of_time = now >= self.stop_at
        for run in self.active.values() if now >= self.kill_at else ():
            assert isinstance(run.process, ForkedProcess)
            run.process.kill()
        if now > self.recorded + RECORD_SECONDS or not self.active:
            n_gpus = max(1, min(len(self.slots), len(self.gpus)))
            self.record["seconds"] += (now - self.recorded) * n_gpus
            self.recorded = now
            write_atomic(self.file, json.dumps(self.record, indent=1) + "\n")
