"""Kill a run repeatedly with SIGKILL, resume it, and record what it reads.

A life is one process for each rank, forked from a server that has imported everything, so it takes
a second. It trains with the real loop. It kills itself at a given event (a step, or a file
operation, mostly of saves), or its parent kills it after some time. The other ranks
are killed too, as torchrun does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import apps.LT2.train as app
import tests.lingua.dist_utils  # noqa: F401, sets what the server imports
from apps.LT2.training.trainer import Trainer
from tests.LT2.tiny_run import train

DISK = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir")
READ = "read.jsonl"  # what the ranks trained on: {life, step, rank, world, micro, batch}
LIFE_SECONDS = 60.0
# A save has about 25 events of rank 0 and renames 4 files, so a life lasts a few steps at most.
MAX_EVENTS, MAX_CHANGES = 60, 8


@dataclass(frozen=True)
class Death:
    """SIGKILL at event number `event` of `rank`, or to all ranks from outside.

    From outside, it comes `seconds` after the `change`-th change in the checkpoint folder.
    """

    rank: int = 0
    event: int | None = None
    change: int | None = None
    seconds: float = 0.0

    @staticmethod
    def draw(rng: random.Random, world_size: int) -> Death:
        if rng.random() < 0.7:
            return Death(rng.randrange(world_size), event=rng.randint(1, MAX_EVENTS))
        return Death(change=rng.randint(0, MAX_CHANGES), seconds=rng.uniform(0, 0.1))


NEVER = Death()


def live(
    folder: Path, data: Path, options: dict[str, Any], life: int, world_size: int, death: Death
) -> bool:
    """Run one life in `folder`, and return whether it reached the end of the run."""
    context = multiprocessing.get_context("forkserver")
    store = folder.with_name(f"{folder.name}.store.{life}")
    started = context.Barrier(world_size + 1)
    processes = [
        context.Process(
            target=_rank_main,
            args=(rank, world_size, store, folder, data, options, life, death, started),
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        started.wait(LIFE_SECONDS)
        if death.change is not None:
            _wait_for_changes(folder / "checkpoints", death.change, processes)
            time.sleep(death.seconds)
        else:
            wait([p.sentinel for p in processes], LIFE_SECONDS)
            if all(p.exitcode in (None, 0) for p in processes):
                for process in processes:
                    process.join(LIFE_SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    # A rank may fail because another was killed, before it is killed itself.
    assert death != NEVER or codes == [0] * world_size, f"life {life} failed: {codes}"
    return codes == [0] * world_size


def _wait_for_changes(folder: Path, n: int, processes: list) -> None:
    def names() -> set[str]:
        return set(os.listdir(folder)) if folder.exists() else set()

    before = names()
    while n and all(p.is_alive() for p in processes):
        time.sleep(0.0005)
        if (now := names()) != before:
            n, before = n - 1, now


def _rank_main(
    rank: int,
    world_size: int,
    store: Path,
    folder: Path,
    data: Path,
    options: dict[str, Any],
    life: int,
    death: Death,
    started: Any,
) -> None:
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {"WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=LIFE_SECONDS),
        )
    _record_what_is_read(folder, life, rank, world_size)
    if death.event is not None and rank == death.rank:
        _die_at(death.event)
    started.wait(LIFE_SECONDS)
    train(data, folder, keep_code=True, **options)
    if dist.is_initialized():
        dist.destroy_process_group()


def _die_at(event: int) -> None:
    n_events = 0

    def mortal(real: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_events
            n_events += 1
            if n_events == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return wrapper

    for name in DISK:
        setattr(os, name, mortal(getattr(os, name)))
    Trainer.step = mortal(Trainer.step)
    Trainer._clip = mortal(Trainer._clip)
    app.agree_any = mortal(app.agree_any)


def _record_what_is_read(folder: Path, life: int, rank: int, world_size: int) -> None:
    inner = Trainer._read_micro_batches

    def read(self: Trainer) -> list[Any]:
        batches = inner(self)
        with open(folder.with_name(f"{folder.name}.{READ}"), "a") as file:
            for micro, batch in enumerate(batches):
                record = {"life": life, "step": self.state.step, "rank": rank, "micro": micro}
                record |= {"world": world_size, "batch": batch_id(batch)}
                file.write(json.dumps(record) + "\n")
        return batches

    Trainer._read_micro_batches = read


def batch_id(batch: Any) -> str:
    return hashlib.sha256(batch.tobytes()).hexdigest()[:16]


def _records(folder: Path) -> list[dict[str, Any]]:
    lines = folder.with_name(f"{folder.name}.{READ}").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps_taken_again(folder: Path) -> list[int]:
    """Return, for each kill, how many steps before it the next life started."""
    steps_by_life: dict[int, list[int]] = {}
    for record in _records(folder):
        steps_by_life.setdefault(record["life"], []).append(record["step"])
    lives = [steps_by_life[life] for life in sorted(steps_by_life)]
    return [max(life) - min(after) for life, after in itertools.pairwise(lives)]


def records_that_count(folder: Path) -> list[dict[str, Any]]:
    """Return the records that led to the final weights: for each step, from its last life."""
    records = _records(folder)
    last_life: dict[int, int] = {}
    for record in records:
        last_life[record["step"]] = max(record["life"], last_life.get(record["step"], -1))
    kept = [r for r in records if r["life"] == last_life[r["step"]]]
    return sorted(kept, key=lambda r: (r["step"], r["micro"], r["rank"]))
