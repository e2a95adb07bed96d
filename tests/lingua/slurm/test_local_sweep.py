"""Runs of a sweep on this machine: GPUs, signals, progress, and warnings."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import lingua.slurm.background as background
import lingua.slurm.local_sweep as local_sweep
from lingua.errors import UserError
from lingua.slurm.background import LocalProcess, failure
from lingua.slurm.local_sweep import LocalSweep, SweepRun
from tests.lingua.test_stool import some_job


class Process:
    """A job that is done at the third look."""

    running: set[str | None] = set()
    output = SimpleNamespace(warnings=lambda: [])

    def __init__(self, job: Any, gpus: str | None):
        assert gpus not in self.running, "two runs on the same GPUs"
        self.gpus, self.looks = gpus, 0
        self.running.add(gpus)

    def done(self) -> bool:
        self.looks += 1
        if self.looks > 2:
            self.running.discard(self.gpus)
        return self.looks > 2

    def failure(self) -> None:
        return None


def jobs_in(folder, n: int, **options: Any) -> list[Any]:
    args = SimpleNamespace(**options)
    return [
        replace(some_job(ngpu=2), dump_dir=folder / f"run={i}", run_args=args) for i in range(n)
    ]


@pytest.mark.parametrize("can_use, gpus", [(True, ["3"]), (False, [])])
def test_a_gpu_that_cuda_cannot_use_does_not_count(monkeypatch, can_use, gpus):
    """The driver lists a GPU that the multi-process service doesn't offer."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: can_use)
    assert background.visible_gpus() == gpus


def test_runs_at_the_same_time_use_different_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(background, "visible_gpus", lambda: ["3", "5", "6", "7", "9"])
    monkeypatch.setattr(local_sweep, "POLL_SECONDS", 0)
    started, most = [], [0]

    def start(job, gpus):
        process = Process(job, gpus)
        started.append(gpus)
        most[0] = max(most[0], len(Process.running))
        return process

    monkeypatch.setattr(local_sweep, "LocalProcess", start)
    sweep = LocalSweep(jobs_in(tmp_path, 5), at_once=2)
    sweep.run()
    assert set(started) == {"3,5", "6,7"} and len(started) == 5
    assert most == [2] and all(run.has_ended for run in sweep.runs)
    with pytest.raises(UserError, match="array=3 ngpu=2.* use array=2"):
        background.gpu_slots(2, 3)
    assert background.gpu_slots(8, 1) == [None]


def test_a_killed_run_names_the_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "run_command", lambda job: ["bash", "-c", "kill -9 $$"])
    process = LocalProcess(jobs_in(tmp_path, 1)[0])
    process._process.wait()
    assert process.failure() == "killed by SIGKILL"


def write_metrics(job, *records: dict[str, Any]) -> None:
    job.dump_dir.mkdir(exist_ok=True)
    with open(job.dump_dir / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_the_time_left_follows_steps_and_costs(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(local_sweep.time, "monotonic", lambda: now[0])
    jobs = jobs_in(tmp_path, 3, steps=10)
    write_metrics(jobs[0], {"global_step": 5, "loss/out": 2.0})  # from before
    sweep = LocalSweep(jobs, 1, costs=[1, 1, 4])
    sweep._since = 90.0
    assert sweep._eta() == ""
    write_metrics(jobs[0], {"global_step": 10, "loss/out": 1.0}, {"global_step": 10, "loss/val": 3})
    sweep.active = {0: sweep.runs[0]}
    assert sweep._eta() == "ETA 0:01:40"  # half a run of cost 1 took 10 s, 5 are left
    assert sweep.runs[0].losses() == "loss 1.0000, val 3.0000"
    write_metrics(jobs[1], {"global_step": 1, "loss/out": None})  # JSON has no NaN
    sweep.runs[1].read_metrics()
    assert sweep.runs[1].losses() == "loss nan"
    assert not sweep.runs[0].is_short and not sweep.runs[2].is_short


def test_a_run_without_metrics_or_steps_has_no_progress(tmp_path):
    (job,) = jobs_in(tmp_path, 1)
    run = SweepRun(job, 1)
    assert (run.fraction, run.is_short, run.losses()) == (0.0, False, "")


def test_a_terminal_shows_active_runs(tmp_path):
    jobs = jobs_in(tmp_path, 2, steps=8)
    sweep = LocalSweep(jobs, 1)
    sweep._since, sweep.active = 0.0, {0: sweep.runs[0]}
    write_metrics(jobs[0], {"global_step": 4, "loss/out": 2.5})
    Console(file=(shown := io.StringIO()), width=80).print(sweep._table())
    first, second = shown.getvalue().splitlines()
    assert first.split() == ["run=0", "step", "4/8", "loss", "2.5000"]
    assert "0 of 2 runs done" in second and "ETA" in second


STOPS = """
trap 'echo stopped; exit 0' TERM INT
kill -{signal} $PPID
for i in {{1..100}}; do sleep 0.05; done
exit 5
"""


@pytest.mark.parametrize(
    "number, end", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_stops_active_runs_and_starts_no_more(tmp_path, monkeypatch, capfd, number, end):
    script = STOPS.format(signal=number.name.removeprefix("SIG"))
    if number == signal.SIGINT:  # the terminal sends it to the run as well
        script = script.replace("$PPID", "$PPID $$")
    monkeypatch.setattr(background, "run_command", lambda job: ["bash", "-c", script])
    monkeypatch.setattr(background, "visible_gpus", lambda: [])
    handler = signal.getsignal(signal.SIGTERM)
    sweep = LocalSweep(jobs_in(tmp_path, 2), at_once=1)
    with pytest.raises(end):
        sweep.run()
    assert [run.has_ended for run in sweep.runs] == [True, False]
    assert sweep.runs[0].error is None, "its own handler ended it"
    assert "dirs_exists_ok=true" in capfd.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_process_reports_its_error_and_its_warnings(tmp_path, monkeypatch):
    (job,) = jobs_in(tmp_path, 1)
    lines = [
        "0: WARNING 26-01-31 12:00:00.123456 - 0:00:07 - a: b - c",
        "    more of it",
        "WARNING 26-01-31 12:00:00.123456 - 1 day, 0:00:07 - late",
        "1: WARNING 26-01-31 12:00:00.123456 - 0:00:08 - a: b - c",
        "0: ERROR   26-01-31 12:00:00.123456 - 0:00:08 - not a warning",
        "error: no luck",
    ]
    text = "\n".join(lines)
    program = f"echo $CUDA_VISIBLE_DEVICES; echo '{text}' >&2; exit 3"
    monkeypatch.setattr(background, "run_command", lambda job: ["bash", "-c", program])
    process = LocalProcess(job, "4,5", detached=True)
    assert os.getpgid(process._process.pid) != os.getpgid(0)
    process._process.wait()
    assert process.done() and process.failure() == "error: no luck"
    assert str(failure(process)) == f"error: no luck; see {process.output.err}"
    assert process.output.warnings() == ["a: b - c", "late"]
    assert process.output.err.read_text().startswith("4,5\n")


@pytest.mark.parametrize(
    "number, error, step, outcome",
    [
        (None, None, 8, "done"),
        (None, None, 4, "stopped"),  # by its own signal
        (None, "error: x", 4, "FAILED"),
        (None, "error: x", 8, "FAILED"),
        (signal.SIGINT, None, 8, "done"),
        (signal.SIGINT, "interrupted", 4, "stopped"),
        (signal.SIGTERM, None, 4, "stopped"),
    ],
)
def test_outcomes(tmp_path, monkeypatch, number, error, step, outcome):
    (job,) = jobs_in(tmp_path, 1, steps=8)
    write_metrics(job, {"global_step": step})
    sweep = LocalSweep([job], 1)
    (run,) = sweep.runs
    monkeypatch.setattr(Process, "failure", lambda self: error)
    monkeypatch.setattr(run, "process", Process(job, "outcome"), raising=False)
    sweep.signal, sweep._since = number, 0.0
    Process.running.clear()
    sweep._end(run)
    assert run.outcome == outcome and run.error == (error if outcome == "FAILED" else None)


@pytest.mark.parametrize("later, fraction", [([], 1.0), ([{"global_step": 6}], 0.75)])
def test_a_run_that_an_option_ended_has_done_everything(tmp_path, later, fraction):
    (job,) = jobs_in(tmp_path, 1, steps=8)
    write_metrics(job, {"global_step": 4, "ended_by": "eval.stop_at=acc/val>=0.9"}, *later)
    run = SweepRun(job, 1)
    assert (run.fraction, run.is_short) == (fraction, fraction < 1)
