"""The state of runs: running, finished, failed, stopped or waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lingua.runs import read_runs
from tests.lingua.stool_utils import held, without_root_powers

START = "0: INFO    26-11-29 09:32:50.228157 - 0:00:10 - "
ENDS = "0: ERROR   26-11-29 09:32:51.228157 - 0:00:11 - the run ends: "


def write_run(folder: Path, *, step: int | None, log: str | None = None, err: str = "") -> Path:
    folder.mkdir()
    if step is None:  # launched by stool
        (folder / "base_config.yaml").write_text("steps: 20\n")
    else:
        (folder / "config.yaml").write_text("steps: 20\n")
        (folder / "metrics.jsonl").write_text(json.dumps({"global_step": step}) + "\n")
    if log is not None:
        (folder / "train.log").write_text(log)
    if err:
        (folder / "logs" / "local").mkdir(parents=True)
        (folder / "logs" / "local" / "run.err").write_text(err)
    return folder


@pytest.mark.parametrize(
    "step, log, err, status, error",
    [
        (20, f"{START}step 20/20\n", "", "finished", None),
        (20, f"{START}step 20/20\n", "ValueError: of an earlier launch\n", "finished", None),
        (20, f"{ENDS}disk full\n", "", "failed", "disk full"),
        (10, f"{ENDS}no luck\n    Traceback:\n    ValueError: no luck\n", "", "failed", "no luck"),
        (10, f"{ENDS}no luck\n{START}resumed\n", "", "stopped", None),
        (10, f"{ENDS}KeyboardInterrupt\n", "", "stopped", None),
        (10, f"{START}step 10/20\n", "", "stopped", None),  # killed
        (10, f"{START}step 10/20\n", "a\ntorch.OutOfMemoryError: CUDA\n", "failed", "torch.Out"),
        (None, None, "", "waiting", None),
        (None, None, "UserWarning: slow\n", "waiting", None),
        (None, None, "x\nerror: optim.lr=high: expected a number\n", "failed", "optim.lr=high"),
    ],
)
def test_status(tmp_path, step, log, err, status, error):
    (run,) = read_runs([write_run(tmp_path / "run", step=step, log=log, err=err)])
    assert run.status == status
    assert (run.error or "").startswith(error or "") and (run.error is None) == (error is None)


@pytest.mark.parametrize("later, status", [([], "finished"), ([{"global_step": 12}], "stopped")])
def test_a_run_that_an_option_ended_is_finished(tmp_path, later, status):
    """Until it is resumed without the option."""
    folder = write_run(tmp_path / "run", step=10, log=f"{START}step 10/20\n")
    records = [{"global_step": 10, "ended_by": "eval.stop_at=acc/val>=0.9"}, *later]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert read_runs([folder])[0].status == status


def test_a_run_that_ended_before_it_wrote_a_log_is_not_waiting(tmp_path):
    folder = write_run(tmp_path / "run", step=None, err="Killed\n")
    os.utime(folder / "logs" / "local", (0, 0))
    assert read_runs([folder])[0].status == "stopped"


def test_a_locked_run_is_running(tmp_path):
    folder = write_run(tmp_path / "run", step=10, log=f"{ENDS}no luck\n")
    with held(folder):
        assert read_runs([folder])[0].status == "running"
        (folder / ".lock").chmod(0o444)  # as of somebody else
        code = (
            "import sys; from lingua.runs import read_runs as r; print(r(sys.argv[1:])[0].status)"
        )
        command = [sys.executable, "-c", code, str(folder)]
        said = subprocess.check_output(command, text=True, preexec_fn=without_root_powers)
        assert said == "running\n"
    assert read_runs([folder])[0].status == "failed"
