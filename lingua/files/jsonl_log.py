"""Files of one JSON record a line: appended to by a run, mended when it goes on, read by others.

    file = RecordFile(dump_dir / "metrics.jsonl")
    file.append({"global_step": 10, "loss/out": 2.3})

Every line is strict JSON; NaN and infinity are null. A record is a whole line or no line, on a full
disk too: what cannot be written waits in memory, since a run should not end for its log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingua.files.atomic import write_atomic

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000  # records, about 5 MB of a training log; of more the oldest are lost


class RecordFile:
    """Appends records; the file, which need not be there, is opened for each.

    An OSError is told of once, and again, with the number of records lost, when writing works.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._n_late = 0  # records that could not be written when they came

    def append(self, record: Mapping[str, Any]) -> None:
        self._waiting.append(json_line(record).encode())
        try:
            append_whole(self.path, b"".join(self._waiting))
        except OSError as error:
            self._n_late += 1
            if self._n_late == 1:
                logger.warning(
                    "%s cannot be written (%s): its records wait in memory until it can, up to %d",
                    *(self.path, error.strerror, MAX_WAITING),
                )
            return
        if self._n_late:
            n_lost = self._n_late + 1 - len(self._waiting)
            logger.warning(
                "%s is written again: of %d records that waited %d are lost",
                *(self.path, self._n_late, n_lost),
            )
        self._n_late = 0
        self._waiting.clear()

    def close(self) -> None:
        """A last try to write what waits."""
        if not self._n_late:
            return
        try:
            append_whole(self.path, b"".join(self._waiting))
        except OSError as error:
            logger.error(
                "%s lacks its last %d records: it cannot be written (%s)",
                *(self.path, self._n_late, error.strerror),
            )
        self._n_late = 0
        self._waiting.clear()


def append_whole(path: Path, data: bytes) -> None:
    """Append `data`, or, where that raises OSError, nothing of it."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        rest = memoryview(data)
        try:
            while rest:  # a disk that gets full takes a part first
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # the first one is the reason
                file.truncate(end)
            raise


def json_line(record: Mapping[str, Any]) -> str:
    """A record as one line of strict JSON, newline included; tensors of one number are numbers."""
    return json.dumps(_jsonable(record), allow_nan=False) + "\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if hasattr(value, "item"):  # tensors and numpy numbers
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def mend_jsonl(path: Path, resume_step: int | None) -> None:
    """Drop a half-written last line (the process was killed), and the records after `resume_step`.

    A record inside the next step (acc_step > 0) comes after the checkpoint as well. A probe's
    record has its step under "meta".
    """
    if not path.exists():
        return
    data = path.read_bytes()
    lines = data.splitlines()
    kept = [line for i, line in enumerate(lines) if _keep(line, i + 1 == len(lines), resume_step)]
    mended = b"".join(line + b"\n" for line in kept)
    if mended != data:
        logger.info("%s: %d of %d records kept", path, len(kept), len(lines))
        write_atomic(path, mended)


def _keep(line: bytes, is_last: bool, resume_step: int | None) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return not is_last  # elsewhere it is nothing that we wrote: leave it alone
    if resume_step is None or not isinstance(record, dict):
        return True
    place = record.get("meta", record)
    if not isinstance(place, dict):
        return True
    step, acc_step = place.get("global_step"), place.get("acc_step") or 0
    if not isinstance(step, int) or not isinstance(acc_step, int):  # no record of ours
        return True
    return (step, acc_step) <= (resume_step, 0)


def read_jsonl_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a metrics file; a half-written line, as of a run that goes on, is none."""
    records = []
    for line in Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def is_recorded(file: Path, step: int, key: str | None = None) -> bool:
    """Whether the file, if there is one, has a record of this step, with this key."""
    records = read_jsonl_records(file) if file.exists() else []
    return any(r.get("global_step") == step and (key is None or key in r) for r in records)
