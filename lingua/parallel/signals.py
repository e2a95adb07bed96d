"""Handle preemption signals (SIGTERM, SIGUSR2) and Ctrl-C, and requeue a SLURM job."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from lingua.parallel.ranks import get_is_master

logger = logging.getLogger(__name__)


def init_signal_handler(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call `handler` on SIGUSR2 (sent by SLURM before the time limit) and on the first SIGTERM.

    A second SIGTERM ends the process, so a run that hangs can be stopped.
    """

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        handler(signum, frame)

    signal.signal(signal.SIGUSR2, handler)
    signal.signal(signal.SIGTERM, on_sigterm)
    # The mask is inherited from the parent, and a blocked signal never arrives.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})


@contextmanager
def defer_interrupt(what: str) -> Iterator[None]:
    """Defer a Ctrl-C (SIGINT) to the end of the block; a second one interrupts at once.

    The first one logs that `what` finishes first. Does nothing outside the main thread, or if
    SIGINT does not have Python's default handler, as inside another `defer_interrupt`.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupted = False

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def on_sigint(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        # Python's default handler would let a nested defer_interrupt defer the second one.
        signal.signal(signal.SIGINT, interrupt)
        logger.warning(f"interrupted: {what} finishes first; press Ctrl-C again to stop at once")

    signal.signal(signal.SIGINT, on_sigint)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt


def requeue_slurm_job() -> bool:
    """Put this SLURM job back into the queue, on rank 0 and inside SLURM only.

    Returns whether the job was requeued. The caller ends the program.
    """
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id is None or not get_is_master():
        return False
    logger.warning(f"requeueing SLURM job {job_id}")
    try:
        subprocess.run(["scontrol", "requeue", job_id], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.error(f"could not requeue SLURM job {job_id}: {error}")
        return False
    return True


# The trainer handles these. Schedulers send them to all processes of a job, and a data worker that
# dies of one would end the run during its last save.
PARENT_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


@contextmanager
def blocked_parent_signals() -> Iterator[None]:
    """Block PARENT_SIGNALS in processes that are started inside, and in their children."""
    resource_tracker.ensure_running()  # before the block, since starting it unblocks signals
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, PARENT_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
