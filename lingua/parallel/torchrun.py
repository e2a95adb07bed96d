"""End the ranks when torchrun is killed. Otherwise they would keep their GPUs and the run's folder.

apps/LT2/__init__.py imports this module first, so that `_parent` is the process id of torchrun.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lingua.errors import MachineFault

PR_SET_PDEATHSIG = 1  # an option of Linux's prctl
GONE = "torchrun has died, and the other ranks with it; nothing was trained"
POLL_SECONDS = 0.5
_parent = os.getppid()  # read first: torchrun may die during the imports, which take seconds


def signal_when_torchrun_dies() -> None:
    """Ask Linux to send SIGUSR2 when torchrun dies; MachineFault if it has died since the import.

    A torchrun killed by SIGKILL cannot end its ranks. The signal is not SIGTERM, since it arrives
    once for each thread of torchrun. Does nothing under other launchers and other systems.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR2, 0, 0, 0)
        if os.getppid() != _parent:
            raise MachineFault(GONE)


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
