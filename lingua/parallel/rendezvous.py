"""Let all ranks of a job meet, and report a rank that waits for others.

torch's own rendezvous waits without a word, and outside of Python, so that no signal can end it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from lingua.errors import MachineFault, UserError, first_line
from lingua.parallel.ranks import (
    Launch,
    find_launch,
    get_is_slurm_job,
    get_master_addr,
    get_master_port,
    read_number,
)
from lingua.parallel.torchrun import GONE

logger = logging.getLogger(__name__)

REPORT_SECONDS = 3.0  # until the wait is logged
RESOLVE_SECONDS = 10.0  # until a host name that is unknown is an error
CONNECT_SECONDS = 5.0
MAX_POLL_SECONDS = 0.5
MAX_NAMED = 8  # missing ranks


def join_ranks(timeout: timedelta) -> dist.Store:
    """Wait until all ranks have joined, and return the store that they share.

    Log once which ranks are missing. SIGTERM and Ctrl-C end the wait. UserError for an address that
    does not work; MachineFault after `timeout`.
    """
    launch = find_launch()
    with _ended_by_sigterm():
        wait = _Wait(launch, *_find_address(), timeout)
        try:
            store = wait.connect()
            wait.for_all(store)
        except dist.DistError as error:
            raise MachineFault(
                f"the store at {wait.address} does not answer any more: the process that serves it "
                f"has ended ({first_line(error)})"
            ) from None
    store.set_timeout(timeout)
    return store


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process at once, since there is nothing to save."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def check_address() -> None:
    """Raise UserError if this job has several ranks and not the address where they meet."""
    if find_launch().world_size > 1 and not dist.is_initialized():
        _find_address()


def _find_address() -> tuple[str, int]:
    """Return the host and port of the store."""
    if get_is_slurm_job():
        return get_master_addr(), get_master_port(read_number("SLURM_JOB_ID"))
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR is not set; set it to the host of rank 0")
    return get_master_addr(), read_number("MASTER_PORT", at_least=1, at_most=2**16 - 1)


class _Wait:
    def __init__(self, launch: Launch, host: str, port: int, timeout: timedelta):
        self.launch, self.host, self.port, self.timeout = launch, host, port, timeout
        self.address = f"{host}:{port}"
        self.start = time.monotonic()
        self.pause, self.is_logged = 0.01, False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def connect(self) -> dist.TCPStore:
        """Serve the store if this is rank 0 and torchrun does not, and connect to it."""
        is_of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        is_server = self.launch.rank == 0 and not is_of_torchrun
        while True:
            try:
                if is_server:
                    socket.getaddrinfo(self.host, self.port)  # the other ranks will need it
                else:
                    socket.create_connection((self.host, self.port), CONNECT_SECONDS).close()
                break
            except ConnectionRefusedError as error:
                if is_of_torchrun:  # it serves the store before it starts the ranks
                    raise MachineFault(GONE) from None
                problem = f"no rank 0 there ({error.strerror})"
            except socket.gaierror as error:
                if self.seconds > RESOLVE_SECONDS:
                    raise UserError(
                        f"MASTER_ADDR={self.host} is not a known host ({error.strerror}); set it "
                        f"to the host of rank 0 ({self.launch.source})"
                    ) from None
                problem = f"unknown host ({error.strerror})"
            except OSError as error:
                problem = f"no rank 0 there ({error.strerror or error})"
            self.poll(self.launch.world_size - 1, problem)
        return self.open_store(is_server)

    def open_store(self, is_server: bool) -> dist.TCPStore:
        host = "127.0.0.1" if is_server else self.host
        timeout = timedelta(seconds=CONNECT_SECONDS)
        options = {"wait_for_workers": False, "timeout": timeout, "multi_tenant": is_server}
        opened: list[dist.TCPStore | dist.DistError] = []

        def attempt() -> None:
            try:
                opened.append(dist.TCPStore(host, self.port, None, is_server, **options))
            except dist.DistError as error:
                opened.append(error)

        # Its timeout does not hold if another program answers, and no signal would end it.
        threading.Thread(target=attempt, name="store", daemon=True).start()
        end = time.monotonic() + 2 * CONNECT_SECONDS
        while not opened and time.monotonic() < end:
            time.sleep(0.01)
        result = opened[0] if opened else None
        if isinstance(result, dist.TCPStore):
            return result
        reason = f" ({first_line(result)})" if result is not None else ""
        raise UserError(
            f"MASTER_PORT={self.port}: another program uses this port on {self.host}{reason}; set "
            "MASTER_PORT to a free port"
        )

    def for_all(self, store: dist.Store) -> None:
        """Join, and wait for the other ranks."""
        rank, world_size = self.launch.rank, self.launch.world_size
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"joined/{restart}", store)
        agreed = store.compare_set("world size", "", str(world_size)).decode()
        if agreed != str(world_size):
            raise UserError(
                f"{self.launch.source}: another rank at {self.address} counts {agreed} ranks; set "
                "the same number for all, and for each job its own MASTER_PORT"
            )
        if store.add(str(rank), 1) > 1:
            raise UserError(
                f"rank {rank} exists twice at {self.address}: two processes have "
                f"{self.launch.source}; give each process its own rank, and each job its own "
                "MASTER_PORT"
            )
        if store.add("all", 1) == world_size:
            store.set("complete", "")
        missing = []
        while not store.check(["complete"]):
            if self.must_report:  # not at each turn: it asks once per rank
                missing = [other for other in range(world_size) if not store.check([str(other)])]
                self.is_logged |= any(other not in missing for other in range(rank))  # it speaks
            named = ", ".join(map(str, missing[:MAX_NAMED]))
            named += ", ..." if len(missing) > MAX_NAMED else ""
            self.poll(len(missing), f"missing: {named}")

    @property
    def must_report(self) -> bool:
        return not self.is_logged and self.seconds > REPORT_SECONDS

    def poll(self, n_missing: int, problem: str) -> None:
        """Pause. Log why after a while, and raise MachineFault after the timeout."""
        launch, seconds = self.launch, self.seconds
        others = f"{n_missing} other rank{'s' if n_missing != 1 else ''}"
        if seconds > self.timeout.total_seconds():
            raise MachineFault(
                f"waited {seconds / 60:.3g} minutes for {others} at {self.address} "
                f"({launch.source}), the limit of distributed.timeout_minutes: {problem}"
            )
        if n_missing and self.must_report:
            self.is_logged = True
            logger.warning(
                "rank %d waits for %s of %d at %s (%s): %s; start them, or %s to run one process",
                *(launch.rank, others, launch.world_size, self.address, launch.source, problem),
                launch.alone,
            )
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, MAX_POLL_SECONDS)
