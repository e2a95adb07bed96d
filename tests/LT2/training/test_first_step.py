"""The log of the first step names the kernel that is tuned, or the compiler."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from apps.LT2.training import first_step
from apps.LT2.training.first_step import describe_work, log_first_step


@pytest.fixture
def paused():
    """Run a function in a thread that calls `pause()` inside; yields a starter of such a thread."""
    inside, leave, threads = threading.Event(), threading.Event(), []

    def pause():
        inside.set()
        leave.wait(20)

    def start(function):
        threads.append(threading.Thread(target=function, args=(pause,)))
        threads[-1].start()
        assert inside.wait(20)

    yield start
    leave.set()
    for thread in threads:
        thread.join()


def test_a_kernel_is_named_while_it_is_tuned(paused):
    autotuner = pytest.importorskip("triton.runtime.autotuner")

    class Kernel:
        @staticmethod
        def fn(x): ...

        def run(self, x, **options):
            pass

    def tune(pause):
        def bench(call, quantiles):
            pause()
            return [1.0] * 3

        configs = [autotuner.Config({}, num_warps=n) for n in (1, 2)]
        autotuner.Autotuner(Kernel(), ["x"], configs, ["x"], None, None, do_bench=bench).run(x=1)

    paused(tune)
    assert describe_work() == "tuning fn"


@pytest.mark.usefixtures("fresh_dynamo")
def test_compilation_is_named(paused):
    def compile(pause):
        def backend(graph, inputs):
            pause()
            return graph.forward

        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))

    assert describe_work() is None
    paused(compile)
    assert str(describe_work()).startswith("compiling a block")


def test_lines_end_with_the_step(caplog, monkeypatch):
    monkeypatch.setattr(first_step, "describe_work", lambda: "tuning toy")
    caplog.set_level(logging.INFO)
    logged = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: logged.set()
    logging.getLogger().addHandler(handler)
    try:
        with log_first_step(0.01):
            assert logged.wait(20)
    finally:
        logging.getLogger().removeHandler(handler)
    assert all(r.getMessage().startswith("first step, 0 s: tuning toy") for r in caplog.records)
    assert "first step" not in [thread.name for thread in threading.enumerate()]
