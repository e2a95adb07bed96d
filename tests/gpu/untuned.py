"""Run Triton kernels without autotuning: every configuration must give right results.

Autotuning tries every configuration at every new head count and head dim, minutes per operator.
`untuned` uses the first that fits the GPU and writes nothing to the cache of tuned choices. For a
process that a test starts:

    python -m tests.gpu.untuned MODULE ARGUMENT...
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def untuned() -> Iterator[None]:
    from triton.runtime.autotuner import Autotuner  # pyright: ignore[reportMissingImports]

    from apps.LT2.kernel import tuning

    bench = Autotuner._bench
    too_slow = [float("inf")] * 3

    def run_once(self, *args, config, **meta):
        if getattr(self, "_settled", None) is self.nargs:  # an earlier configuration fits
            return too_slow
        timings = bench(self, *args, config=config, **meta)
        if timings != too_slow:
            self._settled = self.nargs
        return timings

    def once(kernel_call, quantiles):
        kernel_call()
        return [0.0] * 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "compile_in_parallel", lambda *_: None)
        patch.setattr(Autotuner, "_bench", run_once)
        patch.setattr(Autotuner, "do_bench", property(lambda self: once))
        patch.setattr(Autotuner, "check_disk_cache", lambda self, key, configs, bench: bench())
        yield


if __name__ == "__main__":
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    with untuned():
        runpy.run_module(module, run_name="__main__", alter_sys=True)
