"""Shared by all tests: one thread, ordered files, and `gpu` tests only with CUDA."""

# ruff: noqa: E402
from __future__ import annotations

import gc
import multiprocessing.util
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the processes that tests start. On two cores, two workers
# with one thread each are faster than two workers with two threads each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# until pytest_collection_finish: imports and collection leave no garbage
gc.disable()

import pytest
import torch

from tests.quick_python import QuickPython, skip_environment_report

torch.set_num_threads(1)
skip_environment_report()
# Shells start background jobs with SIGINT ignored, but some tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    from hypothesis import settings
except ImportError:  # property tests skip themselves
    pass
else:
    # No deadlines, because shared machines are uneven. The same examples every time, so that a
    # failure can be repeated.
    settings.register_profile("lt2", deadline=None, derandomize=True)
    settings.load_profile("lt2")


QUICK = "LT2_QUICK_PYTHON"  # the folder of the `python` that all workers of a session share


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not in workers of xdist
        multiprocessing.util.get_temp_dir()  # outside of `folder`: it is removed after `folder`
        folder = tempfile.mkdtemp(dir=memory_folder())
        os.environ["TMPDIR"] = os.environ[QUICK] = folder
        tempfile.tempdir = None  # reads TMPDIR again


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        folder = Path(os.environ.pop(QUICK))
        QuickPython(folder).stop()
        shutil.rmtree(folder, ignore_errors=True)  # killed processes may still write


def memory_folder() -> str | None:
    """Return a folder in memory, where tests write half a GB and don't wait for a disk.

    All files are removed at the end. To keep them, use --basetemp.
    """
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 2**30:
        return str(memory)
    return None


@pytest.fixture(scope="session")
def quick_python() -> QuickPython:
    """Return a `python` that has torch imported, for commands run as a user runs them."""
    return QuickPython(Path(os.environ[QUICK])).start()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Reset torch.compile before and after the test, with its limits."""
    import torch._dynamo

    config = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    before = {name: getattr(config, name) for name in names}
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    for name, value in before.items():
        setattr(config, name, value)


def pytest_collection_finish() -> None:
    """Exclude torch and the tests from garbage collection, which then takes milliseconds."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def freeze_what_a_file_leaves() -> Iterator[None]:
    """Also exclude objects that a test file leaves, such as modules and compiled code."""
    yield
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_files_in_order(items), reverse=True)  # stable: tests of a file keep their order
    if torch.cuda.is_available():
        return
    no_cuda = pytest.mark.skip(reason="needs CUDA")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)


def _files_in_order(items: list[pytest.Item]) -> Callable[[pytest.Item], Any]:
    """Start long files first, so that no core idles at the end: slow tests, then many tests."""
    n_tests = Counter(item.path for item in items)
    n_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    return lambda item: (n_slow[item.path] > 0, n_tests[item.path], str(item.path))
