"""Shared by benchmarks: timers, the device's ceilings, and a record of the environment.

Times come from CUDA events on a GPU, and from the process clock on a CPU.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apps.LT2.training.summary import format_versions
from lingua.metrics import peak_flops
from lingua.slurm.code import code_version

Action = Callable[[], Any]


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Action, device: torch.device) -> float:
    """Time `action` on the device, in seconds."""
    if device.type != "cuda":
        began = time.perf_counter()
        action()
        return time.perf_counter() - began
    # By default an event is for the current device, which may be another one.
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    action()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1000


def release_memory() -> None:
    """Free unreferenced memory for the next measurement."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Detect out-of-memory errors of torch, its CPU allocator, Triton and cuBLAS.

    Causes count too: a CUDA graph fails to close after it.
    """
    while error is not None:
        words = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, RuntimeError) and any(w in words for w in OUT_OF_MEMORY)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---- ceilings of the device


@dataclass(frozen=True)
class Ceilings:
    copy_bytes_per_s: float  # read and written; the copy exceeds every cache
    matmul_flops: float  # FLOP/s of a large square matrix product
    datasheet_flops: float | None  # None for unknown devices and CPUs


COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> Ceilings:
    """Measure the fastest of `repeats` copies, and of as many matrix products in `dtype`."""

    def fastest(action: Action) -> float:
        action()  # load libraries, raise the clocks
        return min(seconds_of(action, device) for _ in range(repeats))

    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = fastest(lambda: target.copy_(source))
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    multiplying = fastest(lambda: torch.mm(a, b, out=out))
    return Ceilings(
        copy_bytes_per_s=2 * source.nbytes / copying,
        matmul_flops=2 * n**3 / multiplying,
        datasheet_flops=peak_flops(device_name(device), dtype) if device.type == "cuda" else None,
    )


# ---- environment


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, versions and commit, to store with a result."""
    version = code_version(Path(__file__).parents[3])
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "versions": format_versions(),
        "commit": version.commit,
        "uncommitted_changes": version.dirty,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or "CPU"
