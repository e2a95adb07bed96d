"""A record is a complete line or no line, and survives a disk that is full for a while."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lingua.files.jsonl_log
from lingua.files.jsonl_log import RecordFile, append_whole

LINE = len('{"n": 0}\n')


@contextmanager
def disk_full_at(n_bytes: int) -> Iterator[None]:
    """Limit the size of this process's files. The part of a write that fits is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_records_wait_for_a_full_disk_in_order(tmp_path, caplog):
    file = RecordFile(tmp_path / "x.jsonl")
    file.append({"n": 0})
    with disk_full_at(LINE + LINE // 2):
        for n in (1, 2, 3):
            file.append({"n": n})
            assert file.path.read_text() == '{"n": 0}\n', "half a line remains"
        (message,) = caplog.messages
        assert "x.jsonl cannot be written (File too large)" in message
    file.append({"n": 4})
    file.append({"n": 5})
    assert numbers(file.path) == [0, 1, 2, 3, 4, 5]
    assert "x.jsonl is written again; 0 records are lost" in caplog.messages[1]
    with disk_full_at(0):
        file.append({"n": 6})
    assert "cannot be written" in caplog.messages[2]
    file.close()
    assert numbers(file.path) == [0, 1, 2, 3, 4, 5, 6]


def test_the_oldest_of_too_many_records_are_lost_and_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(lingua.files.jsonl_log, "MAX_WAITING", 3)
    file = RecordFile(tmp_path / "x.jsonl")
    with disk_full_at(0):
        for n in range(5):
            file.append({"n": n})
    file.append({"n": 5})
    assert numbers(file.path) == [3, 4, 5]
    assert "3 records are lost" in caplog.messages[-1]


def test_records_lost_at_the_end_are_logged(tmp_path, caplog):
    file = RecordFile(tmp_path / "gone" / "x.jsonl")
    file.append({"n": 0})
    file.append({"n": 1})
    file.close()
    (_, last) = caplog.records
    assert last.levelno == logging.ERROR and "its last 2 records are lost" in last.getMessage()
    assert not file.path.parent.exists()


def test_a_partial_write_is_undone(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before\n")
    with disk_full_at(10), pytest.raises(OSError, match="File too large"):
        append_whole(path, b"after\n")
    assert path.read_bytes() == b"before\n"
