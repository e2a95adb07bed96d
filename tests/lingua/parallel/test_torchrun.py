"""A rank goes when torchrun is gone, whatever it is doing."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lingua.parallel.signals import init_signal_handler
from lingua.parallel.torchrun import signal_when_torchrun_dies

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="as Linux tells of dead parents")


@pytest.mark.parametrize("launcher, told", [("TORCHELASTIC_RUN_ID", b"2"), ("LOCAL_RANK", b"")])
def test_a_rank_is_told_that_torchrun_was_killed(monkeypatch, launcher, told):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv(launcher, "0")
    reader, writer = os.pipe()
    torchrun = os.fork()
    if torchrun == 0:
        if os.fork() == 0:
            rank(writer)
        signal.pause()
    assert os.read(reader, 1) == b"1"  # ready
    os.kill(torchrun, signal.SIGKILL)
    os.waitpid(torchrun, 0)
    os.close(writer)
    patience = 30 if told else 0.3
    ready, _, _ = select.select([reader], [], [], patience)
    assert (os.read(reader, 1) if ready else b"") == told
    os.close(reader)


def rank(writer: int) -> None:
    init_signal_handler(lambda *_: os.write(writer, b"2") and os._exit(0))
    signal_when_torchrun_dies()
    os.write(writer, b"1")
    signal.sigtimedwait([], 5)
    os._exit(0)


# A rank as torchrun starts it, which waits for a store that nobody serves.
RANK = """
import os, sys, time
print("started", os.getpid(), flush=True)
EARLY
import lingua.parallel.torchrun
print("imported", flush=True)
LATE
from lingua.distributed import setup_torch_distributed
from lingua.parallel.args import DistributedArgs
from lingua.errors import run_cli
from lingua.parallel.signals import init_signal_handler
init_signal_handler(lambda *_: None)  # as training does: it saves after the step
args = DistributedArgs(fsdp_type="full_shard", spawn_method="spawn")
run_cli(lambda _: (print("waits", flush=True), setup_torch_distributed(args)))
"""


MOMENTS = {"started": "EARLY", "imported": "LATE", "waits": ""}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rank_whose_torchrun_is_killed_before_it_trains_ends(tmp_path, moment):
    code = RANK
    for place in ("EARLY", "LATE"):
        code = code.replace(place, "time.sleep(1)" if place == MOMENTS[moment] else "")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    environment |= {"TORCHELASTIC_RUN_ID": "0", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    log = tmp_path / "log"
    with open(log, "w") as file:
        torchrun = subprocess.Popen(
            ["bash", "-c", '"$@" & wait', "-", sys.executable, "-c", code],
            env=environment,
            stdout=file,
            stderr=file,
        )
    wait_for(log, moment)
    torchrun.kill()
    torchrun.wait()
    wait_for(log, "error: rank 1: torchrun is gone")
    pid = int(log.read_text().split()[1])
    for _ in range(100):
        if not is_alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the rank goes on")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(log: Path, text: str) -> None:
    for _ in range(600):
        if text in log.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} in {log.read_text()!r}")
