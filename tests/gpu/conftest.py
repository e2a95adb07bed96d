"""GPU tests run kernels untuned: a kernel is right with any of its configurations, or it is not."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import measured


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A table of the worst error of each tensor in each file, for reports in docs/benchmarks."""
    worst: dict[tuple[str, str, float], float] = {}
    for test, name, error, bound in measured:
        if test.startswith("tests/gpu/"):
            key = (test.split("::")[0].removeprefix("tests/gpu/"), name, bound)
            worst[key] = max(error, worst.get(key, 0.0))
    if not worst:
        return
    terminalreporter.write_line("| test file | tensor | worst relative error | bound |")
    terminalreporter.write_line("|---|---|---|---|")
    for (file, name, bound), error in sorted(worst.items()):
        terminalreporter.write_line(f"| {file} | {name} | {error:.1e} | {bound:.0e} |")


@pytest.fixture(scope="session", autouse=True)
def first_configuration_that_fits():
    """Tuning tries every configuration of a kernel at every new head count and width, which takes
    minutes for each operator. Here the first that fits the GPU is taken; nothing is written to the
    cache of tuned choices."""
    if not torch.cuda.is_available():
        yield
        return
    from triton.runtime.autotuner import Autotuner  # pyright: ignore[reportMissingImports]

    bench = Autotuner._bench
    too_slow = [float("inf")] * 3

    def run_once(self, *args, config, **meta):
        if getattr(self, "_settled", None) is self.nargs:  # an earlier one fits these arguments
            return too_slow
        timings = bench(self, *args, config=config, **meta)
        if timings != too_slow:
            self._settled = self.nargs
        return timings

    def once(kernel_call, quantiles):
        kernel_call()
        return [0.0] * 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autotuner, "_bench", run_once)
        patch.setattr(Autotuner, "do_bench", property(lambda self: once))
        patch.setattr(Autotuner, "check_disk_cache", lambda self, key, configs, bench: bench())
        yield
