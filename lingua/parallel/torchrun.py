"""End the ranks when torchrun is killed. Otherwise they would keep their GPUs and the run's folder.

apps/LT2/__init__.py imports this module first, so that `_parent` is the process id of torchrun.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lingua.errors import MachineFault

PR_SET_PDEATHSIG = 1  # an option of Linux's prctl
GONE = "torchrun has died, and the other ranks with it; nothing was trained"
POLL_SECONDS = 0.5
CONNECT_SECONDS = 5.0
_parent = os.getppid()  # read first: torchrun may die during the imports, which take seconds


def _note_parent() -> None:
    global _parent
    _parent = os.getppid()


os.register_at_fork(after_in_child=_note_parent)


def signal_when_torchrun_dies() -> None:
    """Ask Linux to send SIGUSR2 when torchrun dies; MachineFault if it is already dead.

    A torchrun killed by SIGKILL cannot end its ranks. The signal is not SIGTERM, since it arrives
    once for each thread of torchrun. Does nothing under other launchers and other systems.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR2, 0, 0, 0)
        if os.getppid() != _parent or (_is_adopter(_parent) and not _is_store_served()):
            raise MachineFault(GONE)


def _is_adopter(pid: int) -> bool:
    """Whether the process adopts orphans. In a container, torchrun itself may have pid 1."""
    try:
        return pid == 1 or Path(f"/proc/{pid}/comm").read_text().strip() == "systemd"
    except OSError:
        return True  # it has died since


def _is_store_served() -> bool:
    """Whether a process listens at the address of torchrun's store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True  # rank 0 serves the store, maybe later
    address = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    try:
        socket.create_connection(address, timeout=CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass  # unknown
    return True


@contextmanager
def exit_with_torchrun() -> Iterator[None]:
    """Exit as soon as torchrun dies, inside the block. Use it while there is nothing to save.

    A thread polls, because Python runs no signal handler while a rank waits for torchrun's store.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    done = threading.Event()

    def poll() -> None:
        while not done.wait(POLL_SECONDS):
            if os.getppid() != _parent:
                rank = os.environ.get("RANK", "?")
                print(f"error: rank {rank}: {GONE}", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=poll, name="torchrun poll", daemon=True).start()
    try:
        yield
    finally:
        done.set()
