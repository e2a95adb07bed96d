"""The worker process gives the same items, reports its errors and never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest

from lingua.dataloader.prefetch import async_iterator
from lingua.errors import UserError

BIG = 1 << 20  # more than a pipe holds: a worker that is ahead blocks inside a message


@contextmanager
def build(n: int | None, error: BaseException | None = None, size: int = 0) -> Iterator[Iterator]:
    def items():
        for i in count() if n is None else range(n):
            yield i, b"x" * size
        if error is not None:
            raise error

    yield items()


@contextmanager
def build_unpicklable() -> Iterator[Iterator]:
    yield iter([1, threading.Lock()])


@contextmanager
def build_recorded(n: int, marker: str) -> Iterator[Iterator]:
    def items():
        for i in range(n):
            with open(marker, "a") as file:
                file.write(f"{i}\n")
            yield i, b"x" * BIG

    yield items()


@contextmanager
def build_pids() -> Iterator[Iterator]:
    yield (os.getpid() for _ in count())


@pytest.fixture(autouse=True)
def never_hang():
    """Fail if the parent waits forever."""

    def fail(*_):
        raise AssertionError("the parent waits for a dead worker")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)


def test_all_items_arrive_in_order():
    with async_iterator(2, partial(build, 50)) as items:
        assert [i for i, _ in items] == list(range(50))


def test_the_worker_does_not_import_the_main_program(tmp_path, monkeypatch):
    program = ModuleType("__main__")
    program.__file__ = str(tmp_path / "program.py")
    Path(program.__file__).write_text("raise SystemExit('imported')")
    monkeypatch.setitem(sys.modules, "__main__", program)
    with async_iterator(2, partial(build, 3)) as items:
        assert [i for i, _ in items] == [0, 1, 2]


def test_the_worker_runs_ahead_but_no_further_than_its_buffer(tmp_path):
    marker = tmp_path / "made"
    with async_iterator(3, partial(build_recorded, 100, str(marker))) as items:
        assert next(items)[0] == 0
        time.sleep(0.5)
        # taken: 1; in the buffer: 3; in the pipe: 1; made, waiting for room: 1
        assert len(marker.read_text().splitlines()) == 6


def test_a_failing_worker_delivers_its_items_and_then_its_traceback():
    got = []
    with (
        pytest.raises(RuntimeError, match="(?s)Traceback.*ZeroDivisionError: seven"),
        async_iterator(4, partial(build, 5, ZeroDivisionError("seven"))) as items,
    ):
        for i, _ in items:
            got.append(i)
    assert got == [0, 1, 2, 3, 4]


def test_a_user_error_stays_one():
    with (
        pytest.raises(UserError, match="^x.jsonl:3: no text$"),
        async_iterator(4, partial(build, 1, UserError("x.jsonl:3: no text"))) as items,
    ):
        list(items)


def test_an_item_that_cannot_be_pickled_is_an_error():
    with (
        pytest.raises(RuntimeError, match="(?s)data worker failed.*pickle"),
        async_iterator(4, build_unpicklable) as items,
    ):
        list(items)


def test_a_worker_killed_inside_a_message_raises():
    import multiprocessing

    with async_iterator(4, partial(build, None, None, BIG)) as items:
        next(items)
        time.sleep(0.3)  # the worker now writes a message that nobody reads
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="exit code -9: killed"):
            for _ in range(20):
                next(items)


def test_closing_ends_the_worker():
    with async_iterator(2, partial(build_pids)) as items:
        pid = next(items)
        assert pid != os.getpid() and is_running(pid)
    assert not is_running(pid)


def test_an_error_in_the_parent_ends_the_worker():
    with pytest.raises(KeyError), async_iterator(2, partial(build_pids)) as items:
        pid = next(items)
        raise KeyError
    assert not is_running(pid)


def test_signals_meant_for_the_trainer_do_not_end_the_worker():
    with async_iterator(1, partial(build_pids)) as items:
        pid = next(items)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        time.sleep(0.2)
        assert is_running(pid)
        assert {next(items) for _ in range(50)} == {pid}
    assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_no_worker_outlives_a_killed_trainer(tmp_path, method):
    """Also a busy one: this worker never reaches its second item."""
    script = tmp_path / "trainer.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing, os, time
        from contextlib import contextmanager
        from lingua.dataloader.prefetch import async_iterator

        def items():
            yield os.getpid()
            time.sleep(1000)

        @contextmanager
        def build():
            yield items()

        if __name__ == "__main__":
            multiprocessing.set_start_method("{method}")
            with async_iterator(2, build) as stream:
                print(next(stream), flush=True)
                time.sleep(1000)
        """)
    )
    root = Path(__file__).parents[3]
    trainer = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        assert is_running(worker)
    finally:
        trainer.kill()
        trainer.communicate()
    assert wait_until_gone(worker)
