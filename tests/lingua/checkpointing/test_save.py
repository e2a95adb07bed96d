"""Background saves, Ctrl-C, and which checkpoints a save deletes."""

from __future__ import annotations

import dataclasses
import errno
import logging
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

import lingua.checkpointing.metadata
import lingua.checkpointing.save
from lingua import distributed as ld
from lingua.checkpoint import SaveEvery, consolidate_checkpoints
from lingua.checkpointing.dcp import tensors_to_save
from lingua.checkpointing.metadata import max_threads
from lingua.checkpointing.save import warn_of_small_disk
from lingua.errors import MachineFault, UserError
from tests.lingua.checkpointing.checkpoint_runs import (
    CONFIG,
    N_FILES,
    assert_same_bits,
    build,
    manager_at,
    tensors,
    train,
    truncate_tensors,
    write_in_threads,
)
from tests.lingua.stool_utils import limited_files

# ---- background saves


@pytest.fixture
def held_disk(monkeypatch):
    """Delay writing tensors until `.set()`. `.is_reached` is set when a save waits."""
    gate: Any = threading.Event()
    gate.is_reached = threading.Event()
    real = lingua.checkpointing.save.FileSystemWriter.write_data

    def write_data(self, plan, planner):
        gate.is_reached.set()
        assert gate.wait(30)
        return real(self, plan, planner)

    monkeypatch.setattr(lingua.checkpointing.save.FileSystemWriter, "write_data", write_data)
    yield gate
    gate.set()


def test_training_continues_during_a_save(tmp_path, held_disk):
    manager = manager_at(tmp_path, async_save=True)
    model, optimizer, state = build()
    train(2, model, optimizer, state)
    want, state_then = tensors(model, optimizer), state.state_dict()
    manager.save(model, optimizer, state, CONFIG)
    train(4, model, optimizer, state)  # in place, so the save must hold copies
    manager.poll()
    assert manager.existing_saves == [], "published before it was written"

    held_disk.set()
    manager.finish()
    assert [p.name for p in manager.existing_saves] == ["0000000002"]
    assert not any(p.suffix for p in tmp_path.iterdir())
    fresh = build()
    assert manager.load(*fresh) is not None
    assert fresh[2].state_dict() == state_then
    assert_same_bits(tensors(*fresh[:2]), want)


def test_poll_publishes_a_written_save_and_save_waits_for_the_pending_one(tmp_path):
    manager = manager_at(tmp_path, async_save=True)
    model, optimizer, state = build()
    for step in (1, 2):
        train(step, model, optimizer, state)
        manager.save(model, optimizer, state, CONFIG)
    assert [p.name for p in manager.existing_saves] == ["0000000001"]
    assert manager._save is not None
    manager._save.wait()
    manager.poll()
    assert [int(p.name) for p in manager.existing_saves] == [1, 2]


def test_a_failed_background_save_raises_and_keeps_the_previous_checkpoint(run, monkeypatch):
    manager, model, optimizer, state = run
    manager.args.async_save = True

    def full_disk(self, plan, planner):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lingua.checkpointing.save.FileSystemWriter, "write_data", full_disk)
    train(3, model, optimizer, state)
    manager.save(model, optimizer, state, CONFIG)
    with pytest.raises(ld.RanksFailed, match=r"could not write .*GiB free.*No space left"):
        manager.finish()
    assert sorted(p.name for p in manager.path.iterdir()) == ["0000000001", "0000000002"]
    loaded = manager.load(*build())
    assert loaded is not None and loaded.step == 2
    assert sorted(p.name for p in manager.path.iterdir()) == ["0000000001", "0000000002"]


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("error", [None, FloatingPointError, KeyError, KeyboardInterrupt])
def test_exit_publishes_the_pending_save_unless_one_rank_of_several_failed(
    tmp_path, monkeypatch, error, n_ranks
):
    model, optimizer, state = build()
    train(1, model, optimizer, state)
    with (
        suppress(FloatingPointError, KeyError, KeyboardInterrupt),
        manager_at(tmp_path, async_save=True) as manager,
    ):
        manager.save(model, optimizer, state, CONFIG)
        monkeypatch.setattr("lingua.checkpoint.get_world_size", lambda: n_ranks)
        if error:
            raise error
    monkeypatch.undo()
    # every rank sees a NaN in the gradient norm
    is_shared = n_ranks == 1 or error in (None, FloatingPointError)
    assert len(manager.existing_saves) == is_shared
    assert (manager.load(*build()) is not None) == is_shared
    assert not any(p.suffix for p in tmp_path.iterdir())


# ---- Ctrl-C


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("n_times", [1, 2])
def test_ctrl_c_waits_for_the_pending_save_and_a_second_one_does_not(
    tmp_path, held_disk, caplog, async_save, n_times
):
    model, optimizer, state = build()
    train(1, model, optimizer, state)
    press_ctrl_c(held_disk.is_reached, caplog, then=held_disk.set if n_times == 1 else _ctrl_c)
    with (
        pytest.raises(KeyboardInterrupt),
        manager_at(tmp_path, async_save=async_save) as manager,
    ):
        manager.save(model, optimizer, state, CONFIG)
        manager.finish()
    assert [int(p.name) for p in manager.existing_saves] == [1] * (n_times == 1)
    assert held_disk.is_set() == (n_times == 1), "waited after the second Ctrl-C"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "Ctrl-C" in caplog.text


def test_a_second_ctrl_c_stops_the_writer_threads(tmp_path, monkeypatch, caplog):
    """At exit, a thread that still writes would abort the process."""
    write_in_threads(monkeypatch)
    real = zlib.crc32
    is_writing = threading.Event()

    def slow(data, value=0):
        is_writing.set()
        time.sleep(0.2)
        return real(data, value)

    monkeypatch.setattr(zlib, "crc32", slow)
    model, optimizer, state = build()
    train(1, model, optimizer, state)
    press_ctrl_c(is_writing, caplog, then=_ctrl_c)
    with pytest.raises(KeyboardInterrupt), manager_at(tmp_path) as manager:
        manager.save(model, optimizer, state, CONFIG)
    time.sleep(0.1)
    writers = ("checkpoint", "_write_files_from_queue")
    assert not [t.name for t in threading.enumerate() if any(name in t.name for name in writers)]


def test_ctrl_c_in_training_publishes_the_pending_save_and_a_second_one_drops_it(
    tmp_path, held_disk, caplog
):
    caplog.set_level(logging.INFO)
    model, optimizer, state = build()
    for step, is_written in ((1, True), (2, False)):
        train(step, model, optimizer, state)
        held_disk.set() if is_written else held_disk.clear()
        with (
            pytest.raises(KeyboardInterrupt),
            manager_at(tmp_path, async_save=True) as manager,
        ):
            manager.save(model, optimizer, state, CONFIG)
            caplog.clear()
            if not is_written:
                after_the_log(caplog, _ctrl_c)
            raise KeyboardInterrupt
        assert [int(p.name) for p in manager.existing_saves] == [1]


def press_ctrl_c(is_writing: threading.Event, caplog: Any, then: Callable[[], None]) -> None:
    """Interrupt the save when it writes, and call `then` when that was handled.

    Two signals at once may arrive as one.
    """

    def press() -> None:
        assert is_writing.wait(30)
        _ctrl_c()
        after_the_log(caplog, then)

    threading.Thread(target=press).start()


def after_the_log(caplog: Any, then: Callable[[], None]) -> None:
    """Call `then` in a thread, when the log says what Ctrl-C does."""

    def wait() -> None:
        end = time.monotonic() + 30
        while "Ctrl-C" not in caplog.text and time.monotonic() < end:
            time.sleep(0.01)
        then()

    threading.Thread(target=wait).start()


def _ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_badly_written_save_replaces_nothing(run, monkeypatch):
    manager, model, optimizer, state = run
    manager.args.dump = SaveEvery(every=1, keep=1)
    real = lingua.checkpointing.save.write_train_state

    def lose_bytes(folder, name, text):
        files = real(folder, name, text)
        truncate_tensors(folder)
        return files

    monkeypatch.setattr(lingua.checkpointing.save, "write_train_state", lose_bytes)
    train(3, model, optimizer, state)
    with pytest.raises(ld.RanksFailed, match="__0_0.distcp"):
        manager.save(model, optimizer, state, CONFIG)
    assert [int(p.name) for p in manager.existing_saves] == [1, 2]


# ---- retention


def save_steps(manager, steps):
    model, optimizer, state = build()
    config = CONFIG | {"checkpoint": dataclasses.asdict(manager.args)}
    for state.step in steps:
        manager.save(model, None, state, config)


@pytest.mark.parametrize(
    "dump, eval, want",
    [
        ((2, 0), (3, 0), [1, 2, 3, 4, 6, 7]),
        ((2, 2), (3, 1), [4, 6, 7]),
        ((2, 1), (3, 0), [3, 6, 7]),
        ((0, 1), (0, 1), [7]),
        ((1, 3), (5, 1), [4, 6, 7]),
    ],
)
def test_keep_rules(tmp_path, dump, eval, want):
    manager = manager_at(tmp_path, dump=SaveEvery(*dump), eval=SaveEvery(*eval))
    save_steps(manager, [1, 2, 3, 4, 6, 7])
    assert [int(p.name) for p in manager.existing_saves] == want


def test_retention_uses_the_rules_of_the_save(tmp_path):
    """A run may resume with other rules than its earlier checkpoints were saved by."""
    before = manager_at(tmp_path, dump=SaveEvery(10, keep=2), eval=SaveEvery(40, keep=0))
    save_steps(before, [10, 20, 30, 40, 50, 55])
    after = manager_at(tmp_path, dump=SaveEvery(25, keep=2), eval=SaveEvery(1000, keep=0))
    save_steps(after, [57])
    assert [int(p.name) for p in after.existing_saves] == [40, 50, 57]
    save_steps(after, [75])
    assert [int(p.name) for p in after.existing_saves] == [40, 50, 75]
    save_steps(after, [100])
    assert [int(p.name) for p in after.existing_saves] == [40, 75, 100]


def test_files_of_others_are_never_deleted(tmp_path):
    foreign = ["0000000001_backup", "00000000001", "0000000003", "0000000001.old", "notes"]
    foreign += ["0000000008.tmp", "0000000009.replaced", "0000000010"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    (tmp_path / "0000000002.tmp").mkdir()
    (tmp_path / "0000000002.tmp" / "__0_0.distcp").write_text("half")
    manager = manager_at(tmp_path, dump=SaveEvery(1, keep=1), eval=SaveEvery(1, keep=1))
    save_steps(manager, [4])
    consolidate_checkpoints(tmp_path / "0000000004")
    save_steps(manager, [5])
    (tmp_path / "0000000005" / "my_plots").mkdir()
    save_steps(manager, [6])
    want = {*foreign, "0000000005", "0000000006"}
    assert {p.name for p in tmp_path.iterdir()} == want
    assert all((tmp_path / name / "precious").exists() for name in foreign)


def test_a_save_does_not_overwrite_files_of_others(run):
    manager, model, optimizer, state = run
    (manager.existing_saves[-1] / "my_plots").mkdir()
    manager.save(model, optimizer, state, CONFIG)  # the same step again
    names = ["0000000001", "0000000002", "0000000002.replaced"]
    assert sorted(p.name for p in manager.path.iterdir()) == names
    assert (manager.path / names[-1] / "my_plots").is_dir()

    (manager.path / "0000000003.tmp").mkdir()
    (manager.path / "0000000003.tmp" / "precious").write_text("mine")
    train(3, model, optimizer, state)
    with pytest.raises(UserError, match="0000000003.tmp"):
        manager.save(model, optimizer, state, CONFIG)
    assert (manager.path / "0000000003.tmp" / "precious").read_text() == "mine"


@pytest.mark.parametrize("in_main_writer", [False, True])
def test_an_error_in_any_writer_thread_fails_the_save(run, monkeypatch, capfd, in_main_writer):
    write_in_threads(monkeypatch)
    real = lingua.checkpointing.save._StagingPlanner.resolve_data
    failed = threading.Event()

    def resolve_data(self, item):
        if (threading.current_thread().name == "checkpoint") == in_main_writer:
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        failed.wait(10)  # leave a tensor for the writer that fails
        return real(self, item)

    monkeypatch.setattr(lingua.checkpointing.save._StagingPlanner, "resolve_data", resolve_data)
    manager, model, optimizer, state = run
    train(3, model, optimizer, state)
    with pytest.raises(MachineFault, match=r"^could not write .*Input/output error"):
        manager.save(model, optimizer, state, CONFIG)
    assert [int(p.name) for p in manager.existing_saves] == [1, 2]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "n_cores, n_ranks, want", [(2, None, 2), (1, None, 2), (16, None, 8), (16, 4, 4), (8, 8, 2)]
)
def test_the_number_of_threads_fits_the_cores(monkeypatch, n_cores, n_ranks, want):
    monkeypatch.setattr(lingua.checkpointing.metadata.os, "cpu_count", lambda: n_cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if n_ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n_ranks))
    assert max_threads() == want


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_keeps_earlier_checkpoints(run, async_save):
    manager, model, optimizer, state = run
    manager.args.async_save = async_save
    train(3, model, optimizer, state)
    message = r"^could not write .*GiB free.*: File too large; raise the limit .*ulimit -f"
    with limited_files(4096), pytest.raises(MachineFault, match=message):
        manager.save(model, optimizer, state, CONFIG)
        manager.finish()
    assert sorted(p.name for p in manager.path.iterdir()) == ["0000000001", "0000000002"]
    manager.save(model, optimizer, state, CONFIG)
    manager.finish()
    assert [int(p.name) for p in manager.existing_saves] == [1, 2, 3]


@pytest.mark.parametrize("n_ranks, n_files", [(1, 1), (2, 1), (2, N_FILES)])
@pytest.mark.parametrize("free, limit, want", [(0, 0, 0), (-1, 0, 1), (0, -1, 1), (-1, -1, 2)])
def test_a_disk_too_small_for_a_checkpoint_is_reported(
    run, monkeypatch, caplog, free, limit, want, n_ranks, n_files
):
    """The size is that of the tensors that a save writes, without step counts."""
    manager, model, optimizer, _ = run
    state = tensors_to_save(model, optimizer)
    written = [*state["model"].values()]
    written += [
        t for own in state["optim"]["state"].values() for n, t in own.items() if n != "step"
    ]
    size = sum(tensor.nbytes for tensor in written)
    if n_files > 1:
        write_in_threads(monkeypatch)
    usage = SimpleNamespace(free=size + free)
    monkeypatch.setattr(lingua.checkpointing.save.shutil, "disk_usage", lambda folder: usage)
    with limited_files(math.ceil(size / n_ranks / n_files) + limit):
        warn_of_small_disk(manager.path, optimizer, n_ranks)
    text = caplog.text
    assert ("free" in text) + ("ulimit -f" in text) == want
    assert (f"checkpoint.path={manager.path}" in text) == (want > 0)
