"""Tune fla's kernels over short lists of configurations.

Triton times every configuration of a kernel at its first call with new shapes. Most of that time
goes to configurations that lose, because they compile slowly or run up to 26 times as long as the
best. Here a kernel tries only configurations that were best in measurements, in tuned/<GPU>.json:

    "chunk_fwd_kernel_o": {
        "best": [{"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 3}],
        "others": [{"BK": 32, "BV": 32, "num_warps": 2, "num_stages": 3}]
    }

A GPU with a file tries the `best` of each kernel, another GPU all configurations of all files. A
kernel without a list, or with a list that does not fit the GPU, tries everything that fla offers.
LT2_TUNE=full does so for all kernels. `apps.LT2.scripts.tune_kernels` writes a file.

fla has a similar mechanism (FLA_CACHE_MODE), which takes precedence if set. It holds one
configuration per shape, and uses it for other shapes without checking that it fits.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lingua.errors import UserError

logger = logging.getLogger(__name__)

OPTION = "LT2_TUNE"
MODES = ("short", "full")
FOLDER = Path(__file__).parent / "tuned"
MAX_THREADS = 8

Entry = dict[str, Any]  # the keyword arguments of a configuration


def tuning_mode() -> str:
    """Return LT2_TUNE, "short" by default. UserError for an unknown value."""
    mode = os.environ.get(OPTION) or MODES[0]
    if mode not in MODES:
        raise UserError(f"{OPTION}={mode} must be one of {', '.join(MODES)}")
    return mode


def file_of_gpu(gpu: str, folder: Path = FOLDER) -> Path:
    """Return the file for a GPU with this name, as torch.cuda.get_device_name() spells it."""
    return folder / f"{re.sub(r'[^0-9A-Za-z]+', '_', gpu)}.json"


def read_lists(gpu: str, folder: Path = FOLDER) -> dict[str, list[Entry]]:
    """Return the configurations that each kernel tries on this GPU."""
    own, lists = file_of_gpu(gpu, folder), {}
    for path in sorted(folder.glob("*.json")):
        for kernel, found in json.loads(path.read_text(encoding="utf-8"))["kernels"].items():
            entries = lists.setdefault(kernel, [])
            entries += [e for e in (*found["best"], *found["others"]) if e not in entries]
    if own.exists():
        kernels = json.loads(own.read_text(encoding="utf-8"))["kernels"]
        lists |= {kernel: found["best"] for kernel, found in kernels.items()}
    return lists


def describe_config(config: Any) -> Entry:
    """Return the keyword arguments of a triton.Config. It omits a num_ctas of 1."""
    return {k: v for k, v in config.all_kwargs().items() if (k, v) != ("num_ctas", 1)}


@cache
def lists_of_this_gpu() -> dict[str, list[Entry]]:
    return {} if tuning_mode() == "full" else read_lists(torch.cuda.get_device_name())


def limit_tuning() -> None:
    """Limit all autotuners in the imported modules of fla. May be called again after an import."""
    if os.environ.get("FLA_CACHE_MODE", "disabled") != "disabled" or not torch.cuda.is_available():
        return
    from triton.runtime.autotuner import Autotuner  # pyright: ignore[reportMissingImports]
    from triton.runtime.jit import KernelInterface  # pyright: ignore[reportMissingImports]

    modules = [m for name, m in sys.modules.items() if name.startswith("fla.") and m is not None]
    for value in [value for module in modules for value in vars(module).values()]:
        while isinstance(value, KernelInterface) and not isinstance(value, Autotuner):
            value = getattr(value, "fn", None)  # of heuristics
        if isinstance(value, Autotuner) and "run" not in vars(value):
            ShortList(value, lists_of_this_gpu().get(value.base_fn.__name__, []))


class ShortList:
    """Limits an autotuner of Triton to some configurations, in place; [] sets no limit.

    Uses Triton's hook for this purpose, `early_config_prune`, after a hook that fla has set. All
    chosen configurations compile in parallel before the first is timed.
    """

    def __init__(self, tuner: Any, entries: list[Entry]):
        from triton.compiler.errors import (  # pyright: ignore[reportMissingImports]
            CompileTimeAssertionFailure,
        )
        from triton.runtime.errors import (  # pyright: ignore[reportMissingImports]
            OutOfResources,
            PTXASError,
        )

        self.misfits = (OutOfResources, PTXASError, CompileTimeAssertionFailure)
        self.tuner, self.entries = tuner, entries
        self.prune, self.run = tuner.early_config_prune, tuner.run
        self.to_time: list[Any] = []
        tuner.early_config_prune, tuner._bench = self.choose, self.time
        tuner.run = self.run_or_try_all

    def choose(self, configs: list[Any], nargs: dict[str, Any], **kwargs: Any) -> list[Any]:
        if self.prune is not None:
            configs = self.prune(configs, nargs, **kwargs)
        by_entry = [c for e in self.entries for c in configs if describe_config(c) == e]
        self.to_time = by_entry or configs
        return self.to_time

    def time(self, *args: Any, config: Any, **kwargs: Any) -> list[float]:
        """Time a configuration. Not called for timings that Triton reads from its cache."""
        if len(self.to_time) > 1:
            compile_in_parallel(self.tuner.fn, self.to_time, self.tuner.nargs | kwargs)
            self.to_time = []
        return type(self.tuner)._bench(self.tuner, *args, config=config, **kwargs)

    def run_or_try_all(self, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel. If no configuration of the list fits, try all others from now on."""
        try:
            return self.run(*args, **kwargs)
        except self.misfits as error:
            if not self.entries:
                raise
            name = self.tuner.base_fn.__name__
            logger.info("%s: no configuration of the short list fits (%s); trying all", name, error)
            self.entries = []
            self.tuner.cache.clear()
            return self.run(*args, **kwargs)


def compile_in_parallel(kernel: Any, configs: list[Any], arguments: dict[str, Any]) -> None:
    """Compile a kernel with each configuration. Errors are left to the first call."""
    from triton.runtime._async_compile import (  # pyright: ignore[reportMissingImports]
        AsyncCompileMode,
    )

    arguments = {name: value for name, value in arguments.items() if name != "warmup"}
    threads = min(len(configs), MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for config in configs:
            kernel.warmup(**arguments, **config.all_kwargs())
