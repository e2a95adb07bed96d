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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
        if on_cuda and config.mem_steps:
            windows.append(MemorySnapshot(folder, config.mem_warmup, config.mem_steps))
        if config.profile_steps:
            windows.append(Trace(folder, config.profile_warmup, config.profile_steps, on_cuda))
    profiler = Profiler(windows)
    try:
        yield profiler
        profiler.warn_missed()
    finally:
        profiler.close()


class Profiler:
    """Opens and closes its windows as iterations pass."""

    def __init__(self, windows: list[Window]):
        self.windows = windows
        self.iteration = -1
        self.step()

    def step(self) -> None:
        """End an iteration."""
        self.iteration += 1
        for window in self.windows:
            if window.is_open and self.iteration >= window.end:
                window.close()
        for window in self.windows:
            if self.iteration == window.start:
                window.open()

    def close(self) -> None:
        for window in self.windows:
            if window.is_open:
                window.close()

    def warn_missed(self) -> None:
        """Warn about windows that start after the last iteration of this process."""
        for window in self.windows:
            if self.iteration < window.start:
                log_on_rank_0(
                    "profiling.%s=%d: no %s was written, because this process ended after %d "
                    "iterations; use a lower value",
                    *(window.option, window.start, window.kind, self.iteration),
                    level=logging.WARNING,
                )


class Window:
    """Record iterations start to end - 1 into one file."""

    kind: str
    option: str  # the one that sets `start`
    suffix: str

    def __init__(self, folder: Path, start: int, steps: int):
        self.start, self.end = start, start + steps
        self.path = folder / f"{self.kind}_rank{get_global_rank():05d}_iter{start:06d}{self.suffix}"
        self.is_open = False

    def open(self) -> None:
        self.is_open = True

    def close(self) -> None:
        """Write the file. A full disk is logged; the run continues."""
        self.is_open = False
        try:
            self.write()
        except OSError as error:
            self.path.unlink(missing_ok=True)
            logger.warning("profiling: could not write %s (%s)", self.path, error.strerror)
        else:
            logger.info("profiling: wrote %s", self.path)

    def write(self) -> None:
        raise NotImplementedError


class MemorySnapshot(Window):
    kind, option, suffix = "memory", "mem_warmup", ".pickle"

    def open(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        super().open()

    def write(self) -> None:
        torch.cuda.memory._dump_snapshot(str(self.path))
        torch.cuda.memory._record_memory_history(enabled=None)


class Trace(Window):
    kind, option, suffix = "trace", "profile_warmup", ".json.gz"

    def __init__(self, folder: Path, start: int, steps: int, on_cuda: bool):
        super().__init__(folder, start, steps)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
        self.on_cuda = on_cuda
        self.profile = profile(activities=activities, record_shapes=True)

    def open(self) -> None:
        self.profile.start()
        super().open()

    def write(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()  # kernels in flight belong to the window
        self.profile.stop()
        self.profile.export_chrome_trace(str(self.path))
