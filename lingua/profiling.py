"""Profile a few iterations: a memory snapshot (CUDA) and a trace of operators and kernels.

    with maybe_run_profiler(dump_dir, model, args.profiling) as profiler:
        for batch in batches:
            ...
            profiler.step()  # once per iteration

Iterations are counted from the start of the process. Under `trace_folder` each rank writes
`trace_rank00000_iter000102.json.gz` (open in https://ui.perfetto.dev) and
`memory_rank00000_iter000100.pickle` (open in https://pytorch.org/memory_viz).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lingua.errors import UserError
from lingua.logger import log_on_rank_0
from lingua.parallel.ranks import get_global_rank

logger = logging.getLogger(__name__)

MAX_MEMORY_EVENTS = 1_000_000  # allocations and frees in a snapshot; older ones are dropped


@dataclass
class ProfilerArgs:
    run: bool = False  # whether to profile
    trace_folder: str = "profiling"  # folder of the files, below dump_dir
    mem_warmup: int = 100  # iterations before the memory snapshot
    mem_steps: int = 2  # iterations in the memory snapshot (CUDA only); 0 for none
    profile_warmup: int = 102  # iterations before the trace
    profile_steps: int = 2  # iterations in the trace; 0 for none

    def __post_init__(self):
        for name in ("mem_warmup", "mem_steps", "profile_warmup", "profile_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"profiling.{name}={getattr(self, name)} must be 0 or more")
        both = self.mem_steps and self.profile_steps
        mem_end = self.mem_warmup + self.mem_steps
        profile_end = self.profile_warmup + self.profile_steps
        if self.run and both and self.mem_warmup < profile_end and self.profile_warmup < mem_end:
            raise UserError(
                f"profiling.profile_warmup={self.profile_warmup}: the trace must not overlap the "
                f"memory snapshot (iterations {self.mem_warmup} to {mem_end - 1}); "
                f"use {mem_end} or more"
            )


@contextmanager
def maybe_run_profiler(
    dump_dir: str | os.PathLike, module: nn.Module, config: ProfilerArgs
) -> Iterator[Profiler]:
    """Yield a Profiler for the device of `module`. It records nothing if config.run is false.

    A window that is open at the end is written, also after an error such as out of memory.
    """
    windows: list[Window] = []
    if config.run:
        folder = Path(dump_dir) / config.trace_folder
        folder.mkdir(parents=True, exist_ok=True)
        on_cuda = any(p.is_cuda for p in module.parameters())
        if on_cuda:
            memory = record_memory(folder / _file_name("memory", config.mem_warmup, "pickle"))
            windows.append(Window("mem_warmup", config.mem_warmup, config.mem_steps, memory))
        path = folder / _file_name("trace", config.profile_warmup, "json.gz")
        trace = record_trace(path, on_cuda)
        windows.append(Window("profile_warmup", config.profile_warmup, config.profile_steps, trace))
    profiler = Profiler([window for window in windows if window.steps])
    try:
        yield profiler
        profiler.warn_missed()
    finally:
        profiler.close()


class Window(NamedTuple):
    option: str  # the one that sets `start`
    start: int
    steps: int
    recording: AbstractContextManager[None]


class Profiler:
    """Opens and closes windows, which do not overlap, as iterations pass."""

    def __init__(self, windows: list[Window]):
        self.windows = windows
        self.iteration = -1
        self._open = ExitStack()
        self.step()

    def step(self) -> None:
        """End an iteration."""
        self.iteration += 1
        for window in self.windows:
            if self.iteration == window.start + window.steps:
                self.close()
        for window in self.windows:
            if self.iteration == window.start:
                self._open.enter_context(window.recording)

    def close(self) -> None:
        """Write the open window, if any."""
        self._open.close()

    def warn_missed(self) -> None:
        """Warn about windows that start after the last iteration of this process."""
        for window in self.windows:
            if self.iteration < window.start:
                log_on_rank_0(
                    "profiling.%s=%d: not reached, because this process ended after %d "
                    "iterations; use a lower value",
                    *(window.option, window.start, self.iteration),
                    level=logging.WARNING,
                )


def _file_name(kind: str, start: int, suffix: str) -> str:
    return f"{kind}_rank{get_global_rank():05d}_iter{start:06d}.{suffix}"


@contextmanager
def record_memory(path: Path) -> Iterator[None]:
    torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
    yield
    with _logged(path):
        torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def record_trace(path: Path, on_cuda: bool) -> Iterator[None]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with profile(activities=activities, record_shapes=True) as trace:
        yield
        if on_cuda:
            torch.cuda.synchronize()  # kernels in flight belong to the window
    with _logged(path):
        trace.export_chrome_trace(str(path))


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Log that the file is written. On a full disk, warn; the run continues."""
    try:
        yield
        logger.info("profiling: wrote %s", path)
    except OSError as error:
        path.unlink(missing_ok=True)
        logger.warning("profiling: could not write %s (%s)", path, error.strerror)
