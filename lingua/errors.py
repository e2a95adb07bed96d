"""End a program with one line on stderr for a user's mistake or a machine's fault."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lingua.redact import redact

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG}
ADVICE = {
    errno.ENOSPC: "free some space, and run the command again",
    errno.EDQUOT: "free some of your quota, and run the command again",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), and run the command again",
}
RUST_ERROR = re.compile(r"\(os error (\d+)\)")


class UserError(ValueError):
    """A mistake that the user can fix, shown as one line without a traceback.

    The message names the dotted option (or file and line), the value, and what would work.
    """


class MachineFault(RuntimeError):
    """A fault of the machine, such as a full disk. A traceback would not help."""


def find_disk_fault(error: BaseException | None) -> str | None:
    """Describe the full, read-only or broken disk that led to an error. None if it is another one.

    Libraries hide the OSError: torch raises an error about a file position after it, and Rust code
    puts its number into the message.
    """
    while error is not None:
        found = RUST_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number in DISK_FAULTS:
            file = getattr(error, "filename2", None) or getattr(error, "filename", None)
            text = f"{file}: {os.strerror(number)}" if file else os.strerror(number)
            return f"{text}; {ADVICE[number]}" if number in ADVICE else text
        error = error.__cause__ or error.__context__
    return None


def is_machine_fault(error: BaseException) -> bool:
    """Whether the error is a MachineFault, or came from a full, read-only or broken disk."""
    return isinstance(error, MachineFault) or find_disk_fault(error) is not None


def run_cli(main: Callable[[list[str]], Any]) -> None:
    """Run `main(argv)` and turn expected errors into one line on stderr.

    Exit with status 2 after a UserError, 1 after a fault of the machine, and 130 after Ctrl-C.
    Other errors end the process with a traceback.
    """
    sys.excepthook = print_traceback
    try:
        main(sys.argv[1:])
    except Exception as error:
        is_mistake = isinstance(error, UserError)
        message = str(error)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            is_mistake, message = True, f"{error.filename}: {error.strerror}"
        elif not is_mistake and not isinstance(error, MachineFault):
            fault = find_disk_fault(error)
            if fault is None:
                raise
            message = fault
        print_error(redact(" ".join(message.splitlines())))
        raise SystemExit(2 if is_mistake else 1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None  # 128 + SIGINT, the shell's convention


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its repr if the message is empty.

    The message may quote a damaged file, so control characters are replaced.
    """
    line = (str(error).strip() or repr(error)).splitlines()[0]
    return "".join(c if c.isprintable() else "?" for c in line)


def print_traceback(kind: type[BaseException], error: BaseException, tb: Any) -> None:
    """Print a traceback as Python's own excepthook does, without secrets."""
    text = "".join(traceback.format_exception(kind, error, tb))
    print(redact(text), file=sys.stderr, end="", flush=True)


def import_optional(module: str, *, extra: str, needed_by: str) -> Any:
    """Import an optional package. If it is missing, the UserError names the extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # a requirement of the package is missing
        target = f"'.[{extra}]'" if extra else "."
        raise UserError(
            f"{needed_by} needs the package {error.name}: pip install -e {target}"
        ) from None


def print_error(message: str) -> None:
    """Print a one-line error on stderr. Of torchrun's local ranks, only the first prints it.

    torchrun's report shows the rank of each error. Without torchrun, the line itself does.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    who = "" if name or rank == "0" else f"rank {rank}: "
    if not name or _is_first(message, Path(name)):
        print(f"error: {who}{message}", file=sys.stderr, flush=True)
    if name:
        _write_report(message, Path(name))


def _is_first(message: str, error_file: Path) -> bool:
    """Whether no other local rank has printed the message. A marker file records that."""
    if "LOCAL_RANK" not in os.environ:  # another launcher's error file
        return True
    digest = hashlib.sha256(message.encode("utf-8", "replace")).hexdigest()[:16]
    try:
        (error_file.parent.parent / f"printed-{digest}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _write_report(message: str, error_file: Path) -> None:
    """Write what torchrun's own report shows, in the format of its `record` decorator."""
    details = {"py_callstack": message, "timestamp": str(int(time.time()))}
    text = json.dumps({"message": {"message": message, "extraInfo": details}})
    with suppress(OSError):
        error_file.write_text(text, encoding="utf-8")
