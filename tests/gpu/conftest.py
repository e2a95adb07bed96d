"""Run kernels untuned, and print a table of errors at the end."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.untuned import untuned
from tests.tolerances import measured


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # of a worker of xdist
    if output is not None:
        output["measured"] = measured


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    output = getattr(node, "workeroutput", {})  # a worker that crashed has none
    measured.extend(output.get("measured", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the worst error of each tensor in each file, for reports in docs/benchmarks."""
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
    if not torch.cuda.is_available():
        yield
        return
    with untuned():
        yield
