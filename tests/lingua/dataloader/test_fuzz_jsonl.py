"""Damaged lines give their text, or a one-line error that names the file and the line.

Files of a few documents are damaged as disks, editors and other programs do, and read as in
training. The result is compared with a plain reading of each line. LT2_FUZZ=2000 sets the number
of cases.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from lingua.dataloader.jsonl import (
    TRAIN_PATTERN,
    distribute_data_to_rank,
    document_text,
    loop_on_jsonl,
)
from lingua.errors import UserError
from tests.fuzz_text import damage_bytes, fuzz_count, no_hang

COUNT = fuzz_count(400)
TEXTS = ["one two", "größer als 漢字 😀", 'a\\b "c" \n\t', "x" * 300, "five"]
KEYS = ["text", "content", "Text", "id", ""]
VALUES: list[Any] = [None, 3, -0.5, True, ["a"], {"text": "in"}, "", "7"]
RAW = [  # lines that no JSON writer gives
    b"",
    b"   ",
    b"\r",
    b"null",
    b'"text"',
    b"{}",
    b'{"text": "a", "text": "b"}',
    b'{"text": "a"} {"text": "b"}',
    b'{"text": "a"},',
    b"{'text': 'a'}",
    b'{"text": NaN}',
    b'{"text": "a", "x": NaN}',
    b'{"text": "\\ud800 lone"}',
    b'{"text": null, "content": "b"}',
    b'{"content": "b", "text": null}',
    b'\xef\xbb\xbf{"text": "bom"}',
    '{"text": "a"}'.encode("utf-16"),
    b'{"text": "tab\there"}',
    b'{"text": "\xed\xa0\x80"}',
]


def some_file(rng: random.Random) -> bytes:
    lines = [json.dumps(some_document(rng), ensure_ascii=rng.random() < 0.5) for _ in range(4)]
    data = [line.encode() for line in lines]
    kind = rng.randrange(4)
    if kind == 0:
        data[rng.randrange(4)] = rng.choice(RAW)
    elif kind == 1:
        document = some_document(rng) | {rng.choice(KEYS): rng.choice(VALUES)}
        data[rng.randrange(4)] = json.dumps(document).encode()
    elif kind == 2:
        data[rng.randrange(4)] = json.dumps({rng.choice(KEYS): rng.choice(VALUES)}).encode()
    whole = rng.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(data) + rng.choice([b"\n", b""])
    return damage_bytes(whole, rng) if kind == 3 else whole


def some_document(rng: random.Random) -> dict[str, Any]:
    return {rng.choice(["text", "content"]): rng.choice(TEXTS), "id": rng.randrange(9)}


def plain_reading(line: bytes) -> str | None:
    """Return the text of a line, or None: the same rule, written differently."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    try:
        plain = re.sub("^\ufeff", "", str(line, "utf-8"))
        document = json.loads(plain, object_pairs_hook=once)
    except (ValueError, AssertionError):
        return None
    if type(document) is not dict:
        return None
    values = [document[key] for key in ("text", "content") if document.get(key) is not None]
    text = values[0] if values else None
    return re.sub("[\ud800-\udfff]", "\ufffd", text) if type(text) is str else None


def read_once(folder: Path) -> list[str]:
    texts = []
    for document, state in loop_on_jsonl(**distribute_data_to_rank(str(folder), 0, 1)):
        if state["current_iter"] > 0:
            return texts
        texts.append(document_text(document))
    raise AssertionError("the stream ends")


@pytest.mark.parametrize("block", range(4))
def test_damaged_lines(block, tmp_path):
    outcomes = {"read": 0, "refused": 0}
    for number in range(block, COUNT, 4):
        data = some_file(random.Random(f"lines {number}"))
        with no_hang(number):
            outcomes[check_case(data, tmp_path)] += 1
    assert all(outcomes.values())


def check_case(data: bytes, folder: Path) -> str:
    file = folder / TRAIN_PATTERN.replace("*", "0")
    file.write_bytes(data)
    lines = [(i, line) for i, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    wanted = [(i, plain_reading(line)) for i, line in lines]
    first_bad = next((i for i, text in wanted if text is None), None)
    try:
        texts = read_once(folder)
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 1000 and str(file) in message
        if lines:
            assert first_bad is not None, f"refused without a reason: {message}"
            assert f"{file}:{first_bad}: " in message
        return "refused"
    assert first_bad is None, f"line {first_bad} was read: {data!r}"
    assert texts == [text for _, text in wanted]
    return "read"
