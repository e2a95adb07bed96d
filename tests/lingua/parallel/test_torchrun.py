"""A rank ends when torchrun dies, also before training."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lingua.parallel import torchrun
from lingua.parallel.signals import init_signal_handler

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")


@pytest.mark.parametrize("launcher, want", [("TORCHELASTIC_RUN_ID", b"2"), ("LOCAL_RANK", b"")])
def test_rank_gets_a_signal_when_torchrun_is_killed(monkeypatch, launcher, want):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv(launcher, "0")
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            rank(writer)
        signal.pause()
    assert os.read(reader, 1) == b"1"  # ready
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    os.close(writer)
    timeout = 30 if want else 0.3
    ready, _, _ = select.select([reader], [], [], timeout)
    assert (os.read(reader, 1) if ready else b"") == want
    os.close(reader)


def rank(writer: int) -> None:
    torchrun._parent = os.getppid()  # the import was in another process
    init_signal_handler(lambda *_: os.write(writer, b"2") and os._exit(0))
    torchrun.signal_when_torchrun_dies()
    os.write(writer, b"1")
    signal.sigtimedwait([], 5)
    os._exit(0)


# A rank that waits for a store without a server.
RANK = """
import os
import lingua.parallel.torchrun
print("imported", os.getpid(), flush=True)
from lingua.distributed import setup_torch_distributed
from lingua.parallel.args import DistributedArgs
from lingua.errors import run_cli
from lingua.parallel import torchrun
from lingua.parallel.signals import init_signal_handler
init_signal_handler(lambda *_: None)  # as in training
args = DistributedArgs(fsdp_type="full_shard", spawn_method="spawn")
run_cli(lambda _: (print("waits", flush=True), setup_torch_distributed(args)))
"""


def test_rank_ends_if_torchrun_is_killed_before_training(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    environment |= {"TORCHELASTIC_RUN_ID": "0", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    log = tmp_path / "log"
    with open(log, "w") as file:
        launcher = subprocess.Popen(
            ["bash", "-c", '"$@" & wait', "-", sys.executable, "-c", RANK],
            env=environment,
            stdout=file,
            stderr=file,
        )
    wait_for(log, "waits")
    launcher.kill()
    launcher.wait()
    wait_for(log, "error: rank 1: torchrun has died")
    pid = int(log.read_text().split()[1])
    for _ in range(100):
        if not is_alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the rank is still running")


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
