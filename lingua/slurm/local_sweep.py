"""Run the jobs of a sweep as processes of this machine, and show their progress.

A terminal shows the active runs, their steps and losses, and the time left. Elsewhere, a line is
printed when a run starts and ends.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

from lingua.evaluations import ENDED_BY
from lingua.files.jsonl_log import read_jsonl_records
from lingua.slurm.background import LocalProcess, gpu_slots
from lingua.slurm.script import Job

POLL_SECONDS = 0.5
TAIL_BYTES = 2**16  # of metrics.jsonl; has the newest records


@dataclass
class SweepRun:
    """A job of a sweep: its process, and what its metrics.jsonl shows."""

    job: Job
    number: int  # from 1
    cost: float = 1.0  # of a step, relative to the other runs
    process: LocalProcess = field(init=False)  # once it has started
    started: float = 0.0
    seconds: float = 0.0  # from start to end
    outcome: str = ""  # done, FAILED or stopped
    error: str | None = None
    warnings: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.read_metrics()
        self.fraction_before = self.fraction  # done before this launch
        self.has_ended = False

    @property
    def label(self) -> str:
        return self.job.dump_dir.name

    @property
    def steps(self) -> int | None:
        return getattr(self.job.run_args, "steps", None)

    @property
    def fraction(self) -> float:
        """The share of the steps that is done."""
        if ENDED_BY in self.metrics:
            return 1.0
        return min(1.0, self.metrics.get("global_step", 0) / self.steps) if self.steps else 0.0

    @property
    def is_short(self) -> bool:
        """Whether the metrics end before the last step, as after a signal."""
        return bool(self.steps) and bool(self.metrics) and self.fraction < 1

    def read_metrics(self) -> None:
        file = self.job.dump_dir / "metrics.jsonl"
        for record in read_jsonl_records(file, TAIL_BYTES) if file.exists() else []:
            self.metrics.pop(ENDED_BY, None)  # counts in the last record only
            self.metrics |= record

    def losses(self) -> str:
        keys = {"loss": "loss/out", "val": "loss/val"}
        found = {name: self.metrics[key] for name, key in keys.items() if key in self.metrics}
        return ", ".join(
            f"{name} {math.nan if loss is None else loss:.4f}" for name, loss in found.items()
        )

    def end(self) -> None:
        self.read_metrics()
        self.error, self.has_ended = self.process.failure(), True
        folder = str(self.job.dump_dir)  # the same warning of several runs is shown once
        self.warnings = [
            text.replace(folder, "DUMP_DIR") for text in self.process.output.warnings()
        ]
        self.seconds = time.monotonic() - self.started


class LocalSweep:
    """Runs jobs, `at_once` at a time on separate GPUs. A failed job does not stop the others.

    `costs` are the costs of a step of each job, for the estimate of the time left. Ctrl-C or
    SIGTERM starts no more jobs and waits for the active ones, which may save a checkpoint.
    A subclass may start runs in another way, stop them before a signal does, and add runs.
    """

    program = "stool"  # named in each line
    to_resume = "resume with dirs_exists_ok=true"

    def __init__(self, jobs: Sequence[Job], at_once: int, costs: Sequence[float] = ()):
        costs = costs or [1.0] * len(jobs)
        numbered = enumerate(zip(jobs, costs, strict=True), start=1)
        self.runs = [SweepRun(job, i, cost) for i, (job, cost) in numbered]
        self.waiting = list(self.runs)
        self.slots = self.find_slots(jobs[0].args.ngpu, at_once)
        self.active: dict[int, SweepRun] = {}  # by slot
        self.signal: int | None = None
        self.is_out_of_time = False
        from rich.console import Console

        self.console = Console(highlight=False, markup=False)

    def find_slots(self, ngpu: int, at_once: int) -> list[str | None]:
        """Return CUDA_VISIBLE_DEVICES of each run at the same time."""
        return gpu_slots(ngpu, at_once)

    def start(self, job: Job, gpus: str | None) -> LocalProcess:
        return LocalProcess(job, gpus)

    def follow(self, run: SweepRun) -> tuple[Job, float] | None:
        """Return a job to run after `run`, which is done, and the cost of its step."""

    def result(self, run: SweepRun) -> str:
        """Return what a run has reached, for the line that says it ended."""
        unit = "answer" if "acc/out" in run.metrics else "token"  # of a task or of text
        return run.losses() and f"{run.losses()} nats per {unit}"

    def check_time(self) -> None:
        """Called twice a second; sets is_out_of_time to stop all runs."""

    @property
    def is_stopping(self) -> bool:
        return self.signal is not None or self.is_out_of_time

    def run(self) -> None:
        """Run all jobs. After a signal, raise KeyboardInterrupt or SystemExit."""
        from rich.live import Live

        has_stopped, self._since = False, time.monotonic()
        with ExitStack() as stack:
            stack.enter_context(self._handle_signals())
            live = Live(console=self.console, auto_refresh=False, transient=True)
            if self.console.is_terminal:
                stack.enter_context(live)
            while self.active or self.waiting:
                for slot, gpus in enumerate(self.slots):
                    if slot in self.active and self.active[slot].process.done():
                        self._end(self.active.pop(slot))
                    if slot not in self.active and self.waiting and not self.is_stopping:
                        self._start(self.waiting.pop(0), slot, gpus)
                self.check_time()
                if self.is_stopping and not has_stopped:
                    has_stopped, self.waiting = True, []
                    self._stop()
                if self.console.is_terminal:
                    live.update(self._table(), refresh=True)
                if self.active:
                    time.sleep(POLL_SECONDS)
        if self.is_stopping:
            n_left = sum(run.outcome in ("", "stopped") for run in self.runs)
            self._print(f"{n_left} runs are not finished; {self.to_resume}")
        if self.signal is not None:
            raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(143)

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            self.signal = number

        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        self._print(f"stopping: {len(self.active)} active runs end first")
        if self.signal != signal.SIGINT:  # the terminal sends Ctrl-C to the runs as well
            for run in self.active.values():
                run.process.terminate()

    def _start(self, run: SweepRun, slot: int, gpus: str | None) -> None:
        run.started, run.process = time.monotonic(), self.start(run.job, gpus)
        self.active[slot] = run
        if not self.console.is_terminal:
            self._print(f"{self._name(run)} starts")

    def _end(self, run: SweepRun) -> None:
        run.end()
        if run.error and not self.is_stopping:
            run.outcome = "FAILED"
        elif run.error or run.is_short or (self.is_stopping and not run.steps):
            run.outcome, run.error = "stopped", None
        else:
            run.outcome = "done"
            if not self.is_stopping and (more := self.follow(run)) is not None:
                self.waiting.append(SweepRun(more[0], len(self.runs) + 1, more[1]))
                self.runs.append(self.waiting[-1])
        parts = [run.error or self.result(run)]
        if not self.is_stopping and any(not run.has_ended for run in self.runs):
            parts.append(self._eta())
        details = "; ".join(part for part in parts if part)
        self._print(f"{self._name(run)}: {run.outcome} after {_time(run.seconds)}: {details}")

    def _name(self, run: SweepRun) -> str:
        return f"run {run.number} of {len(self.runs)}: {run.label}"

    def _print(self, text: str) -> None:
        self.console.print(f"{self.program}: {text}", soft_wrap=True)

    def _eta(self) -> str:
        for run in self.active.values():
            run.read_metrics()
        done = sum(run.cost * (run.fraction - run.fraction_before) for run in self.runs)
        left = sum(run.cost * (1 - run.fraction) for run in self.runs if not run.has_ended)
        if done <= 0:
            return ""
        return f"ETA {_time((time.monotonic() - self._since) * left / done)}"

    def _table(self) -> Any:
        """Show the active runs, and the state of the sweep."""
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(overflow="ellipsis", no_wrap=True)
        eta = self._eta()
        for run in self.active.values():
            step = f"step {run.metrics.get('global_step', 0)}/{run.steps}" if run.steps else ""
            table.add_row(f"  {run.label}", step, run.losses())
        n_ended = sum(run.has_ended for run in self.runs)
        elapsed = _time(time.monotonic() - self._since)
        table.add_row(f"  {n_ended} of {len(self.runs)} runs done, {elapsed}", eta)
        return table


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
