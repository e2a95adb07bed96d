"""Files with one JSON record per line: append to them, repair them on resume, read them.

    file = RecordFile(dump_dir / "metrics.jsonl")
    file.append({"global_step": 10, "loss/out": 2.3})

Every line is strict JSON; NaN and infinity become null. Even on a full disk, a record is a complete
line or no line. Records that cannot be written wait in memory; a run does not end for its log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lingua.files.atomic import write_atomic

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000  # records, about 5 MB of a training log; the oldest are lost first


class RecordFile:
    """Append records to a file, which is opened for each record.

    The first OSError is logged. So is the number of lost records when writing works again.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._n_unwritten = 0  # waiting or lost

    def append(self, record: Mapping[str, Any]) -> None:
        self._waiting.append(json_line(record).encode())
        self._n_unwritten += 1
        self._write()

    def _write(self) -> None:
        try:
            append_whole(self.path, b"".join(self._waiting))
        except OSError as error:
            if self._n_unwritten == 1:
                logger.warning(
                    "%s cannot be written (%s); up to %d records wait in memory",
                    *(self.path, error.strerror, MAX_WAITING),
                )
            return
        if self._n_unwritten > 1:
            n_lost = self._n_unwritten - len(self._waiting)
            logger.warning("%s is written again; %d records are lost", self.path, n_lost)
        self._waiting.clear()
        self._n_unwritten = 0

    def close(self) -> None:
        """Try once more to write the waiting records."""
        if self._waiting:
            self._write()
        if self._waiting:
            logger.error("%s: its last %d records are lost", self.path, self._n_unwritten)


def append_whole(path: Path, data: bytes) -> None:
    """Append all of `data`, or nothing if that raises OSError."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        rest = memoryview(data)
        try:
            while rest:  # a disk that fills up first accepts a part
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # raise the first error
                file.truncate(end)
            raise


def json_line(record: Mapping[str, Any]) -> str:
    """Format a record as a line of strict JSON. One-element tensors become numbers."""
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


def repair_jsonl(path: Path, resume_step: int | None) -> None:
    """Drop a half-written last line and the records that come after `resume_step`.

    A record inside the next step (acc_step > 0) comes after the checkpoint.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    lines = data.splitlines()
    kept = [line for i, line in enumerate(lines) if _keep(line, i + 1 == len(lines), resume_step)]
    repaired = b"".join(line + b"\n" for line in kept)
    if repaired != data:
        logger.info("%s: kept %d of %d records", path, len(kept), len(lines))
        write_atomic(path, repaired)


def _keep(line: bytes, is_last: bool, resume_step: int | None) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return not is_last  # only our last line can be half-written
    place = record.get("meta", record)  # a probe's record has its step under "meta"
    step = place.get("global_step")
    if resume_step is None or not isinstance(step, int):
        return True
    return (step, place.get("acc_step") or 0) <= (resume_step, 0)


def read_jsonl_records(
    path: str | os.PathLike, last_bytes: int | None = None
) -> list[dict[str, Any]]:
    """Read all records, or those in the last bytes, except a line that is only half-written."""
    with open(path, "rb") as file:
        if last_bytes is not None:
            file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
        lines = file.read().splitlines()
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def is_recorded(
    file: Path,
    step: int,
    key: str | None = None,
    accept: Callable[[dict[str, Any]], bool] = lambda record: True,
) -> bool:
    """Whether the file exists and has a record of this step, with this key, that is accepted."""
    records = read_jsonl_records(file) if file.exists() else []
    return any(
        r.get("global_step") == step and (key is None or key in r) and accept(r) for r in records
    )
