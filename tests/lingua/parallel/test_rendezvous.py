"""Ranks wait for each other, say for whom, and can be interrupted."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from datetime import timedelta

import pytest

from lingua.errors import MachineFault, UserError
from lingua.parallel import rendezvous
from lingua.parallel.ranks import Launch
from lingua.parallel.rendezvous import _Wait, check_address, join_ranks

SOON, LATER = timedelta(seconds=0.3), timedelta(seconds=20)


@pytest.fixture
def start(monkeypatch, free_port):
    """Return a function that joins as a rank of manually started processes."""
    monkeypatch.setattr(rendezvous, "REPORT_SECONDS", 0.05)
    monkeypatch.setattr(rendezvous, "CONNECT_SECONDS", 0.3)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def join(rank, world_size, timeout=SOON, **variables):
        place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
        for name, value in {**place, **address, **variables}.items():
            monkeypatch.setenv(name, str(value))
        return join_ranks(timeout)

    return join


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_in_thread(rank, world_size, port):
    """Join as another rank, and return the thread with its outcome."""
    outcome = []
    launch = Launch(rank, rank, world_size, (), "")

    def join():
        try:
            wait = _Wait(launch, "127.0.0.1", port, LATER)
            wait.is_logged = True
            store = wait.connect()
            wait.for_all(store)
            outcome.append(store.get("greeting"))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=join)
    thread.start()
    return thread, outcome


def test_ranks_share_a_store(start, free_port):
    thread, outcome = join_in_thread(1, 2, free_port)
    store = start(0, 2, LATER)  # keep it, since this rank serves it
    store.set("greeting", "hello")
    thread.join()
    assert outcome == [b"hello"]


@pytest.mark.parametrize(
    "rank, world_size, want",
    [(0, 2, "1 other rank of 2 .*missing: 1;"), (0, 4, "3 other ranks.*missing: 1, 2, 3;")]
    + [(1, 2, "1 other rank of 2 .*no rank 0 there"), (3, 4, "3 other ranks .*no rank 0 there")],
)
def test_a_rank_that_waits_says_for_whom(start, free_port, caplog, rank, world_size, want):
    with pytest.raises(MachineFault, match="distributed.timeout_minutes"):
        start(rank, world_size)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"rank {rank} waits for ") and re.search(want, line), line
    assert f"127.0.0.1:{free_port} (RANK={rank} WORLD_SIZE={world_size})" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_ends_the_wait(start, rank):
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        start(rank, 2, LATER)


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_ends_the_wait(start, rank):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, lambda *_: None)  # as in training
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        start(rank, 2, LATER)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unknown_host_is_named(start, monkeypatch, rank):
    monkeypatch.setattr(rendezvous, "RESOLVE_SECONDS", 0.1)
    with pytest.raises(UserError, match="MASTER_ADDR=no.host.invalid"):
        start(rank, 2, LATER, MASTER_ADDR="no.host.invalid")


@pytest.mark.parametrize("variable", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_address_is_found_before_the_wait(monkeypatch, variable):
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {**launch, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(variable)
    check_address()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"{variable} is not set"):
        check_address()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_of_another_program_is_named(start, free_port, rank):
    with socket.create_server(("127.0.0.1", free_port)), pytest.raises(UserError) as caught:
        start(rank, 2, LATER)
    assert f"MASTER_PORT={free_port}" in str(caught.value)


def test_a_rank_that_exists_twice_is_named(start, free_port):
    thread, outcome = join_in_thread(1, 3, free_port)
    second, twice = join_in_thread(1, 3, free_port)
    with pytest.raises(MachineFault, match="missing: 2"):
        start(0, 3, timedelta(seconds=1))
    second.join()
    thread.join()
    errors = [str(error) for error in (*outcome, *twice) if isinstance(error, UserError)]
    assert len(errors) == 1 and "rank 1 exists twice" in errors[0]


def test_ranks_that_count_differently_are_named(start, free_port):
    thread, outcome = join_in_thread(1, 2, free_port)
    store = start(0, 2, LATER)
    with pytest.raises(UserError, match="WORLD_SIZE=3.* counts 2 ranks"):
        start(2, 3, LATER)
    store.set("greeting", "")
    thread.join()


def test_a_torchrun_that_died_before_the_imports_is_named(start):
    with pytest.raises(MachineFault, match="torchrun has died"):
        start(1, 2, LATER, TORCHELASTIC_USE_AGENT_STORE="True")
