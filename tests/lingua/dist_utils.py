"""Run a test's function on several gloo ranks, in processes of their own.

    def check(rank, world_size, tmp_path): ...          # at module level, so that it can be pickled
    run_ranks(2, check, tmp_path)                       # list of the ranks' return values

A rank that fails ends the others and fails the test with its traceback; ranks that hang fail it
after `timeout` seconds. The process group is there when the function starts.
"""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# Ranks and runs that are to be killed fork from a server that has imported all this. It must be
# said before anything starts the server. A rank has a server of its own, for data workers.
PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch._dynamo",  # the first optimizer step imports it
    "pytest",
    "apps.LT2.train",
    "tests.lingua.frozen",
]
if mp.parent_process() is None:
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
# what launchers say of a rank
RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_PROCID")
TIMEOUT = 90.0  # seconds; starting a rank takes a few on a busy machine


def run_ranks(world_size: int, fn: Callable, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    # Ranks are not daemons: those may not have data workers.
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
    """Counts the operators inside it by name, those of backward and of collectives too."""

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
        assert ready, f"ranks {missing} said nothing for {timeout} s: they hang"
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pipes[rank].recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
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
    """Pickled with its tensors: torch's own way to send one needs the sender to live on."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
