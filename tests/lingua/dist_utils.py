"""Run a function of a test on several gloo ranks, each in a new process.

    def check(rank, world_size, tmp_path): ...          # at module level, so it can be pickled
    run_ranks(2, check, tmp_path)                       # returns the ranks' results

The process group exists when the function starts. A rank that fails ends the others and fails the
test with its traceback. Ranks that hang fail the test after `timeout` seconds.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]


def _at_root(start: Callable[[], None]) -> Callable[[], None]:
    def start_at_root() -> None:
        with contextlib.chdir(ROOT):
            start()

    return start_at_root


# Ranks, and runs that tests kill, fork from a server that has imported this module. It must be set
# before the server starts. Each rank has another server for its data workers.
# Python 3.11 imports it from the current folder, and ignores errors:
# https://github.com/python/cpython/issues/117378
# A rank imports this too, before `mp.parent_process` is set.
if mp.current_process().name == "MainProcess":
    mp.get_context("forkserver").set_forkserver_preload(["tests.lingua.frozen"])
    server: Any = forkserver._forkserver
    server.ensure_running = forkserver.ensure_running = _at_root(server.ensure_running)
# set by launchers
RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_PROCID")
TIMEOUT = 90.0  # seconds; ranks start slowly on a busy machine


def run_ranks(world_size: int, fn: Callable, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    # Daemonic processes cannot start data workers.
    context = mp.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        pipes: list[Connection] = []
        processes = []
        for rank in range(world_size):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(rank, world_size, store, theirs, fn, args)
            )
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            results = _collect(pipes, timeout)
            for process in processes:
                process.join(10)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return results


class OpCounter(TorchDispatchMode):
    """Count operators by name, including the backward and collectives."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [p for rank, p in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout)
        missing = sorted(set(range(len(pipes))) - results.keys())
        assert ready, f"ranks {missing} hang: no result for {timeout} s"
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pipes[rank].recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = torch.load(io.BytesIO(value), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    rank: int, world_size: int, store: str, pipe: Connection, fn: Callable, args: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        assert "tests.lingua.frozen" in sys.modules, "the server imported nothing: ranks are slow"
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        pipe.send((True, _to_bytes(fn(rank, world_size, *args))))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _to_bytes(value: Any) -> bytes:
    """Serialize a value, because a tensor in a pipe needs its sender to stay alive."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
