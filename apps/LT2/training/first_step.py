"""Log what the first step of a process spends its time on: it tunes kernels and compiles blocks."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch._dynamo.utils import counters

from lingua.distributed import get_is_master
from lingua.logger import log_on_rank_0

PERIOD = 10.0  # seconds between two lines

AUTOTUNER = os.path.join("triton", "runtime", "autotuner.py")
COMPILERS = tuple(os.path.join("torch", name, "") for name in ("_dynamo", "_inductor"))
COMPILE = {"_compile_inner", "compile_fx", "compile_fx_inner", "_compile_fx_inner"}


@contextmanager
def log_first_step(period: float = PERIOD) -> Iterator[None]:
    """Log every `period` seconds what is tuned or compiled, until the block ends. Rank 0 only."""
    if not get_is_master():
        yield
        return
    began, stop = time.monotonic(), threading.Event()

    def watch() -> None:
        while not stop.wait(period):
            if work := describe_work():
                log_on_rank_0("first step, %.0f s: %s", time.monotonic() - began, work)

    thread = threading.Thread(target=watch, name="first step", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def describe_work() -> str | None:
    """Return "tuning <kernel>" or "compiling ...", or None if no thread does either."""
    for thread, frame in sys._current_frames().items():
        if thread != threading.get_ident() and (work := _work_of(frame)):
            return work
    return None


def _work_of(frame: FrameType | None) -> str | None:
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(AUTOTUNER) and "self" in frame.f_locals:
            return f"tuning {frame.f_locals['self'].base_fn.__name__}"
        if code.co_name in COMPILE and any(part in code.co_filename for part in COMPILERS):
            return f"compiling a block, {counters['stats']['unique_graphs']} done"
        frame = frame.f_back
    return None
