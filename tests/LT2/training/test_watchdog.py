"""A rank that hangs is named, and so is one that was stopped, while the others still wait."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from apps.LT2.training.trainer import Trainer
from lingua.distributed import gather_objects
from lingua.parallel.watchdog import describe
from tests.lingua.dist_utils import run_ranks
from tests.LT2.tiny_run import train, write_corpus

OPTIONS = {
    "steps": 3,
    "model.n_layers": 1,
    "model.attention_pattern": None,
    "distributed.timeout_minutes": 0.03,
    "distributed.spawn_method": "fork",
}


def wait_for(log: Path, *texts: str) -> bool:
    for _ in range(600):
        with suppress(FileNotFoundError):
            if all(text in log.read_text() for text in texts):
                return True
        time.sleep(0.05)
    return False


def hang_on_rank_1(rank, world_size, data, folder):
    inner = Trainer._read_micro_batches
    named = []

    def read(self):
        if rank == 1 and self.state.step == 1:
            named.append(wait_for(folder / "train.log", "rank 1 is not in a collective: tests/"))
        return inner(self)

    Trainer._read_micro_batches = read
    try:
        train(data, folder, **OPTIONS)
    finally:
        Trainer._read_micro_batches = inner
    log = (folder / "train.log").read_text()
    assert named == ([True] if rank == 1 else [])
    assert "in wait_for" in log and "rank 0 waits in a collective: lingua/distributed.py" in log


def stop_rank_1(rank, world_size, data, folder):
    pids = gather_objects(os.getpid())
    inner = Trainer._read_micro_batches
    named = []

    def read(self):
        if rank == 1 and self.state.step == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return inner(self)

    def let_go_on():
        silent = f"rank 1 is silent: it hangs, was stopped, or died (process {pids[1]} on"
        named.append(wait_for(folder / "train.log", silent))
        os.kill(pids[1], signal.SIGCONT)

    helper = threading.Thread(target=let_go_on)
    if rank == 0:
        helper.start()
    Trainer._read_micro_batches = read
    train(data, folder, **OPTIONS)
    if rank == 0:
        helper.join()
        assert named == [True]


def check(rank, world_size, data, folder):
    hang_on_rank_1(rank, world_size, data, folder / "hangs")
    stop_rank_1(rank, world_size, data, folder / "stopped")


def test_the_rank_that_all_wait_for_is_named(tmp_path):
    run_ranks(2, check, write_corpus(tmp_path / "data"), tmp_path)


def test_suspects_come_first_and_the_crowd_is_counted():
    report = {"where": "a.py:1 in f", "process": "process 1", "in_collective": True}
    reports = {rank: report for rank in range(8) if rank != 3}
    reports[5] = report | {"in_collective": False}
    lines = describe(reports, world_size=8, processes={3: "process 7 on b"})
    assert [line[:6] for line in lines[:2]] == ["rank 3", "rank 5"]
    assert "is silent" in lines[0] and "(process 7 on b)" in lines[0]
    assert "not in a collective: a.py:1 in f" in lines[1]
    assert len(lines) == 7 and lines[-1] == "and 2 more ranks there"
