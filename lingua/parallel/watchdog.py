"""Name the rank that a run waits for, before the timeout of a collective ends the run.

    with HangWatchdog(timeout_minutes=30) as watchdog:
        for step in ...:
            watchdog.beat(step)

A thread of each rank checks for progress. If no step ends within most of the timeout, every rank
puts a report of its position into the store of the process group. The first rank to report logs
which ranks wait in a collective, which do not, and which are silent. The watchdog only logs.
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

from lingua.errors import first_line

logger = logging.getLogger(__name__)

PATIENCE = 0.8  # of the timeout; the rest is for collecting the reports
MAX_SHOWN = 4  # ranks at the same position that get a line each
ROOT = Path(__file__).resolve().parents[2]
COLLECTIVES = os.path.join("torch", "distributed", "")


class HangWatchdog:
    """Report hangs of a run with several ranks. With one rank, do nothing."""

    def __init__(self, timeout_minutes: float):
        self._patience = PATIENCE * 60 * timeout_minutes
        self._step = 0
        self._last = time.monotonic()
        self._reported = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> HangWatchdog:
        if dist.is_initialized() and dist.get_world_size() > 1:
            # A clone, because the training thread may hold the lock of the original.
            default: Any = dist.distributed_c10d._get_default_store()
            store = dist.PrefixStore("hang", default.clone())
            store.set(_process_key(dist.get_rank()), _process())
            self.beat(self._step)
            args = (store, dist.get_rank(), dist.get_world_size(), threading.get_ident())
            self._thread = threading.Thread(
                target=self._watch, args=args, name="hang watchdog", daemon=True
            )
            self._thread.start()
        return self

    def beat(self, step: int) -> None:
        """Record that training is alive after `step`."""
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
                    store.set(str(rank), json.dumps(_report(watched, self._step)))
                    self._stop.wait(2 * pause)  # the other ranks notice within one pause
                    self._log_reports(store, rank, world_size)
                elif self._reported and not is_late:
                    store.delete_key(str(rank))
            except (RuntimeError, OSError) as error:  # DistError is a RuntimeError
                logger.error(
                    "no step has ended for %.0f s and the store does not answer: the process that "
                    "serves it (rank 0 or torchrun) has died or hangs (%s)",
                    *(self._patience, first_line(error)),
                )
                return
            self._reported = is_late

    def _log_reports(self, store: dist.Store, rank: int, world_size: int) -> None:
        reports, processes = {}, {}
        for other in range(world_size):
            if store.check([str(other)]):
                reports[other] = json.loads(store.get(str(other)))
            elif store.check([_process_key(other)]):
                processes[other] = store.get(_process_key(other)).decode()
        if reports and rank == min(reports):
            logger.warning(  # not an error: it may be a long evaluation
                "no step has ended for %.0f s, after step %d\n%s",
                *(self._patience, self._step, "\n".join(describe(reports, world_size, processes))),
            )


def describe(
    reports: dict[int, dict[str, Any]], world_size: int, processes: Mapping[int, str]
) -> list[str]:
    """Return one line per rank, likely culprits first: silent ranks, then the rarest positions.

    `processes` identifies silent ranks. On GPUs all positions may be equal, because Python runs
    ahead of the device and waits for it outside of the collective.
    """
    silent = [rank for rank in range(world_size) if rank not in reports]
    why = "is silent: it hangs, was stopped, or died"
    lines = [f"rank {rank} {why} ({processes.get(rank, 'unknown process')})" for rank in silent]
    groups: dict[tuple[bool, str], list[int]] = {}
    for rank, report in reports.items():
        groups.setdefault((report["in_collective"], report["where"]), []).append(rank)
    for (in_collective, where), ranks in sorted(groups.items(), key=lambda g: (len(g[1]), g[0])):
        state = "waits in a collective" if in_collective else "is not in a collective"
        shown = ranks[:MAX_SHOWN]
        lines += [f"rank {rank} {state}: {where} ({reports[rank]['process']})" for rank in shown]
        if len(ranks) > MAX_SHOWN:
            lines.append(f"and {len(ranks) - MAX_SHOWN} more ranks there")
    return lines


def _report(watched: int, step: int) -> dict[str, Any]:
    """Locate the watched thread: the innermost line of this project's code."""
    frame: FrameType | None = sys._current_frames().get(watched)
    where, in_collective = "unknown", False
    while frame is not None:
        file = frame.f_code.co_filename
        in_collective |= COLLECTIVES in file
        if where == "unknown" and Path(file).is_relative_to(ROOT) and "site-packages" not in file:
            name = Path(file).relative_to(ROOT)
            where = f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    process = f"{_process()}, after step {step}"
    return {"where": where, "in_collective": in_collective, "process": process}


def _process_key(rank: int) -> str:
    return f"process of {rank}"


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
