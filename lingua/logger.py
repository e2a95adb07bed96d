"""One log format for all ranks, without secrets. Rank 0 also writes a file.

    0: INFO    26-01-31 12:00:00.123456 - 0:00:07 - message

Warnings and errors go to stderr, other lines to stdout. Under SLURM the prefix has no rank, because
srun labels the lines. Debug output of other libraries is always off.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lingua.errors import UserError, is_machine_fault
from lingua.parallel.ranks import get_global_rank, get_is_master, get_is_slurm_job
from lingua.redact import redact as redact

HANDLER_NAME = "lingua"
CLEAR_LINE = "\r\x1b[K"  # of a terminal
OWN_LOGGERS = ("root", "lingua", "apps", "setup", "__main__")


def init_logger(
    log_file: str | os.PathLike | None = None, *, name: str | None = None, level: str = "INFO"
) -> None:
    """Set up the root logger, or the logger `name`. A second call replaces the handlers."""
    logger = logging.getLogger(name)
    logger.setLevel(level.upper())
    for handler in list(logger.handlers):
        # logging.basicConfig leaves a bare StreamHandler, which would print every line twice.
        if handler.get_name() == HANDLER_NAME or type(handler) is logging.StreamHandler:
            logger.removeHandler(handler)
            handler.close()
    if name is not None:
        logger.propagate = False  # else the root's handlers print the line again

    out = StreamHandler(sys.stdout)
    out.addFilter(lambda record: record.levelno < logging.WARNING)
    err = StreamHandler(sys.stderr)
    err.setLevel(logging.WARNING)
    handlers: list[logging.Handler] = [out, err]
    if log_file is not None and get_is_master():
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(FileHandler(log_file, mode="a", encoding="utf-8"))
    formatter = LogFormatter()
    for handler in handlers:
        handler.set_name(HANDLER_NAME)
        handler.setFormatter(formatter)
        handler.addFilter(_is_ours_or_no_debug)
        logger.addHandler(handler)


def log_on_rank_0(message: str, *args: Any, level: int = logging.INFO) -> None:
    """Log a message that is the same on all ranks."""
    if get_is_master():
        logging.getLogger().log(level, message, *args)


def show_status(text: str) -> None:
    """Show a short text on rank 0's terminal until the next line of the log."""
    if get_is_master() and sys.stdout.isatty():
        with contextlib.suppress(OSError):  # the terminal was closed
            print(CLEAR_LINE + text, end="", flush=True)


@contextmanager
def end_in_log_file() -> Iterator[None]:
    """Write an error or Ctrl-C that leaves the block to the log files; run_cli prints it."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        is_expected = isinstance(error, UserError | KeyboardInterrupt) or is_machine_fault(error)
        trace = None if is_expected else (type(error), error, error.__traceback__)
        text = str(error) or type(error).__name__
        place = ("root", logging.ERROR, __file__, 0)
        record = logging.LogRecord(*place, "the run ends: %s", (text,), trace)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)
        raise


class WarnOnce(logging.Handler):
    """Warn once if a stream cannot be written. logging prints a traceback for every line."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            where = getattr(self, "baseFilename", "stdout or stderr")
            with contextlib.suppress(OSError):
                print(f"{where} cannot be written ({error.strerror})", file=sys.stderr, flush=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # raised again for lines that are still buffered
            super().close()


class StreamHandler(WarnOnce, logging.StreamHandler):
    def format(self, record: logging.LogRecord) -> str:
        return (CLEAR_LINE if self.stream.isatty() else "") + super().format(record)


class FileHandler(WarnOnce, logging.FileHandler):
    pass


class LogFormatter(logging.Formatter):
    """Prefix rank, level, time and time since the start; indent further lines."""

    def __init__(self) -> None:
        super().__init__()
        self.start = time.time()
        self.rank = "" if get_is_slurm_job() else f"{get_global_rank()}: "

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%y-%m-%d %H:%M:%S.%f")
        elapsed = timedelta(seconds=max(0, round(record.created - self.start)))
        prefix = f"{self.rank}{record.levelname:<7} {when} - {elapsed} - "
        text = super().format(record)  # with the traceback, if any
        return redact(prefix + text.replace("\n", "\n    "))


def _is_ours_or_no_debug(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.INFO or record.name.partition(".")[0] in OWN_LOGGERS
