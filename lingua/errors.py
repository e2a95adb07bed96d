"""Mistakes that a user can mend, and faults of a machine: one line on stderr, no traceback."""

from __future__ import annotations

import errno
import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

from lingua.redact import redact
from lingua.told_once import tell

MAX_LENGTH = 2000  # characters of a message
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG}


class UserError(ValueError):
    """A mistake that the user can mend, shown as one line without a traceback.

    The message names the dotted option (or file and line), the value, and what would work.
    """


class MachineFault(RuntimeError):
    """What a machine does to a program, as a full disk: where in the code tells nothing."""


def is_machine_fault(error: BaseException) -> bool:
    """Whether it is a MachineFault, or an OSError of a disk that is full, read-only or broken."""
    is_disk = isinstance(error, OSError) and error.errno in DISK_FAULTS
    return is_disk or isinstance(error, MachineFault)


def run_cli(main: Callable[[list[str]], Any]) -> None:
    """Run `main(argv)`; a UserError becomes one line on stderr and exit status 2, a fault of the
    machine one and status 1, Ctrl-C 130. Ranks that have the same error tell it once.

    Any other error ends the process with its traceback.
    """
    sys.excepthook = print_traceback
    try:
        main(sys.argv[1:])
    except (UserError, MachineFault, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            error = UserError(f"{error.filename}: {error.strerror}")
        if not isinstance(error, UserError) and not is_machine_fault(error):
            raise
        tell(one_line(error))
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None  # 128 + SIGINT, as shells say it


def one_line(error: Exception) -> str:
    """The message as it is shown: a value in it may have lines, and be as long as it likes."""
    text = redact(" ".join(str(error).splitlines()))
    return (
        text
        if len(text) <= MAX_LENGTH
        else f"{text[: MAX_LENGTH // 2]} ... {text[-MAX_LENGTH // 2 :]}"
    )


def first_line(error: BaseException) -> str:
    """What an error of another package says, as a part of a message of one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def print_traceback(kind: type[BaseException], error: BaseException, tb: Any) -> None:
    """Python's own excepthook, less the secrets that an error's text may have got hold of."""
    text = "".join(traceback.format_exception(kind, error, tb))
    print(redact(text), file=sys.stderr, end="", flush=True)


def import_optional(module: str, *, extra: str, needed_by: str) -> Any:
    """Import a package that not every machine has; its absence is a UserError naming the cure."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # the package is there; something that it needs itself is not
        target = f"'.[{extra}]'" if extra else "."
        raise UserError(
            f"{needed_by} needs the package {error.name}: pip install -e {target}"
        ) from None
