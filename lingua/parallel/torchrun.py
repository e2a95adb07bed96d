"""A rank goes when torchrun is killed: on its own it would hold its GPU and its folder, unseen.

Imported early (apps/LT2/__init__.py): to see that its parent is gone, a rank must have seen it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from lingua.errors import MachineFault

PR_SET_PDEATHSIG = 1  # of Linux' prctl
GONE = "torchrun is gone, and with it the other ranks; nothing was trained"
LOOK_SECONDS = 0.5
ANSWER_SECONDS = 5.0
_parent = os.getppid()  # looked at early: imports take seconds, in which torchrun may be killed


def _note_parent() -> None:
    global _parent
    _parent = os.getppid()


os.register_at_fork(after_in_child=_note_parent)


def signal_when_torchrun_dies() -> None:
    """Get SIGUSR2 when torchrun is gone: killed by SIGKILL it can end none of its ranks, and these
    would go on unseen, holding their GPUs. Under other launchers, and off Linux, nothing changes.
    Where it is gone already, a MachineFault.

    Not SIGTERM: the signal comes once for each of torchrun's threads.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR2, 0, 0, 0)
        if os.getppid() != _parent or (_is_adopter(_parent) and not _is_store_served()):
            raise MachineFault(GONE)


def _is_adopter(pid: int) -> bool:
    """Whether the process gets the children of dead ones. In a container torchrun may be one."""
    try:
        return pid == 1 or Path(f"/proc/{pid}/comm").read_text().strip() == "systemd"
    except OSError:
        return True  # gone since


def _is_store_served() -> bool:
    """Whether something listens where torchrun has the store of its ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True  # rank 0 will, if it is not there yet
    address = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    try:
        socket.create_connection(address, timeout=ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True  # no telling
    return True


@contextlib.contextmanager
def exit_with_torchrun() -> Iterator[None]:
    """Inside, the process ends as soon as torchrun is gone. For the time before there is anything
    to save: who waits for torchrun's store then runs no signal handler of Python."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            if os.getppid() != _parent:
                rank = os.environ.get("RANK", "?")
                print(f"error: rank {rank}: {GONE}", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=look, name="torchrun watch", daemon=True).start()
    try:
        yield
    finally:
        done.set()
