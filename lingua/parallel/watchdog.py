"""Which rank a run waits for: named before a collective's timeout ends the run without saying.

    with HangWatchdog(timeout_minutes=30) as watch:
        for step in ...:
            watch.beat(step)

A thread of each rank looks at the clock. When no step has ended for most of the timeout, every
rank leaves word of where it is in the store of the process group; the first rank that could do so
tells who waits in a collective, who is elsewhere, and who left no word. It only tells: the run is
ended by the timeout of the collective, or goes on.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

PATIENCE = 0.8  # of the timeout; what is left is enough to ask around
SHOWN = 4  # ranks at one place that have a line each
ROOT = Path(__file__).resolve().parents[2]
COLLECTIVES = os.path.join("torch", "distributed", "")


class HangWatchdog:
    """Does nothing in a run of one rank."""

    def __init__(self, timeout_minutes: float):
        self._patience = PATIENCE * 60 * timeout_minutes
        self._step = 0
        self._last = time.monotonic()
        self._reported = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> HangWatchdog:
        if dist.is_initialized() and dist.get_world_size() > 1:
            # A copy of its own: the training may sit in the other one's lock.
            default: Any = dist.distributed_c10d._get_default_store()
            store = dist.PrefixStore("stall", default.clone())
            store.set(_of_process(dist.get_rank()), _process())
            self.beat(self._step)
            args = (store, dist.get_rank(), dist.get_world_size(), threading.get_ident())
            self._thread = threading.Thread(
                target=self._watch, args=args, name="stall watch", daemon=True
            )
            self._thread.start()
        return self

    def beat(self, step: int) -> None:
        """The training is alive, and at `step`."""
        self._step, self._last = step, time.monotonic()

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, store: dist.Store, rank: int, world_size: int, watched: int) -> None:
        pause = min(10.0, self._patience / 20)
        while not self._stop.wait(pause):
            is_late = time.monotonic() - self._last > self._patience
            try:
                if is_late and not self._reported:
                    store.set(str(rank), json.dumps(_word_of(watched, self._step)))
                    self._stop.wait(2 * pause)  # the others notice within one
                    self._report(store, rank, world_size)
                elif self._reported and not is_late:
                    store.delete_key(str(rank))
            except (RuntimeError, OSError) as error:  # DistError is a RuntimeError
                message = "no step has ended for %.0f s and the store does not answer: the process "
                message += "that holds it (rank 0, or torchrun's) died or hangs (%s)"
                logger.error(message, self._patience, str(error).partition("\n")[0])
                return
            self._reported = is_late

    def _report(self, store: dist.Store, rank: int, world_size: int) -> None:
        words, processes = {}, {}
        for other in range(world_size):
            if store.check([str(other)]):
                words[other] = json.loads(store.get(str(other)))
            elif store.check([_of_process(other)]):
                processes[other] = store.get(_of_process(other)).decode()
        if words and rank == min(words):
            logger.warning(  # a long evaluation is no stall
                "no step has ended for %.0f s, after step %d\n%s",
                *(self._patience, self._step, "\n".join(describe(words, world_size, processes))),
            )


def describe(
    words: dict[int, dict[str, Any]], world_size: int, processes: Mapping[int, str]
) -> list[str]:
    """Lines for a person from the words that ranks have left, the likely suspects first.

    processes: of ranks without a word, as they have told at their start.

    Those are ranks without a word, then ranks at a place where few others are. On a GPU all may
    look alike: Python runs ahead of the device, and waits for it outside of the collective.
    """
    silent = [rank for rank in range(world_size) if rank not in words]
    silence = "left no word: it hangs, was stopped, or died"
    lines = [f"rank {r} {silence} ({processes.get(r, 'unknown process')})" for r in silent]
    groups: dict[tuple[bool, str], list[int]] = {}
    for rank, word in words.items():
        groups.setdefault((word["in_collective"], word["where"]), []).append(rank)
    for (in_collective, where), ranks in sorted(groups.items(), key=lambda g: (len(g[1]), g[0])):
        what = "waits for other ranks" if in_collective else "is in no collective"
        lines += [f"rank {r} {what}: {where} ({words[r]['process']})" for r in ranks[:SHOWN]]
        if len(ranks) > SHOWN:
            lines.append(f"and so for {len(ranks) - SHOWN} ranks more")
    return lines


def _word_of(watched: int, step: int) -> dict[str, Any]:
    """Where the watched thread of this process is: the innermost line of our own code."""
    frame: FrameType | None = sys._current_frames().get(watched)
    where, in_collective = "unknown", False
    while frame is not None:
        file = frame.f_code.co_filename
        in_collective |= COLLECTIVES in file
        if where == "unknown" and Path(file).is_relative_to(ROOT) and "site-packages" not in file:
            name = Path(file).relative_to(ROOT)
            where = f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return {
        "where": where,
        "in_collective": in_collective,
        "process": f"{_process()}, after step {step}",
    }


def _of_process(rank: int) -> str:
    return f"process of {rank}"


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
