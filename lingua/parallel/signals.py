"""Signals of a run: preemption (SIGTERM, SIGUSR2), Ctrl-C, and the SLURM requeue."""

from __future__ import annotations

import contextlib
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
    """Call `handler` on SIGUSR2 (SLURM's early warning) and on the first SIGTERM.

    A second SIGTERM ends the process, so that a run that hangs can still be stopped.
    """

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        handler(signum, frame)

    signal.signal(signal.SIGUSR2, handler)
    signal.signal(signal.SIGTERM, on_sigterm)
    # A process inherits its parent's mask, and a blocked signal would never arrive.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})


@contextlib.contextmanager
def defer_interrupt(what: str) -> Iterator[None]:
    """A Ctrl-C (SIGINT) inside takes effect at the end, after a word about `what`; a second one,
    as usual, at once. Changes nothing where SIGINT is ignored, or is not Python's own to handle, as
    inside of another `defer_interrupt`."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked = False

    def leave(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def on_sigint(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        # Not Python's own handler: in it the next one inside would see that nobody has asked yet.
        signal.signal(signal.SIGINT, leave)
        logger.warning(f"interrupted: {what} is finished first; Ctrl-C again leaves at once")

    signal.signal(signal.SIGINT, on_sigint)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt


def requeue_slurm_job() -> bool:
    """Put this SLURM job back into the queue. Only rank 0 does, and only inside SLURM.

    Returns whether a job was requeued. Leaving the program is up to the caller.
    """
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id is None or not get_is_master():
        return False
    if os.environ.get("LAUNCH_WITH") == "DORA":
        logger.info("not requeueing: DORA does it")
        return False
    logger.warning(f"requeueing SLURM job {job_id}")
    try:
        subprocess.run(["scontrol", "requeue", job_id], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.error(f"could not requeue SLURM job {job_id}: {error}")
        return False
    return True


# The trainer decides what these mean. Schedulers send them to all processes of a job, and a worker
# that died of them would end the run in the middle of its last save.
PARENT_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


@contextmanager
def blocked_parent_signals() -> Iterator[None]:
    """What is started inside blocks them from its first instant, and so does all that it forks."""
    resource_tracker.ensure_running()  # here, since its start unblocks signals
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, PARENT_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
