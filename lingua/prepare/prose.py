"""Select passages of English prose, and recognize passages that were seen before."""

from __future__ import annotations

import re
import textwrap
import zlib
from collections.abc import Iterator
from typing import Any

SHINGLE = 6  # words; a passage with more than half of its shingles seen before is a repeat

WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
LIST_ITEM = re.compile(r"^\s*([-*•]|\(?\d+[.)])\s+")
RULE = re.compile(r"([-=*#~_^+.])\1{3,}")  # an underline or a divider
SYMBOLS = re.compile(r"[^A-Za-z0-9\s.,;:'\"()?!-]")
COMMON = (
    "a an and any are as at be been but by can do does for from has have if in into is it its may "
    "more must no not of on one only or other should so such than that the their them then there "
    "these they this to used was we when where which will with you your"
)
COMMON_WORDS = frozenset(COMMON.split())


def is_prose(passage: str) -> bool:
    """Return whether a passage is English prose, not code, a table or a signature."""
    words = WORD.findall(passage)
    if len(words) < 6 or not passage.endswith((".", ":", "!", "?", ".)", '."', ";")):
        return False
    common = sum(word.lower() in COMMON_WORDS for word in words) / len(words)
    symbols = len(SYMBOLS.findall(passage)) / len(passage)
    letters = sum(map(len, words)) / len(passage)
    return common >= 0.2 and symbols <= 0.05 and letters >= 0.65


def items(block: str) -> Iterator[str]:
    """Yield a paragraph, or each item of a list, as one line."""
    lines: list[str] = []
    for line in textwrap.dedent(block).splitlines():
        is_rule = RULE.search(line)
        if is_rule or LIST_ITEM.match(line):
            yield " ".join(" ".join(lines).split())
            lines = []
        if not is_rule:
            lines.append(line)
    yield " ".join(" ".join(lines).split())


def passages(text: str) -> Iterator[str]:
    """Yield the prose of a text by paragraphs and list items."""
    for block in re.split(r"\n\s*\n", text):
        if ">>>" not in block:
            yield from filter(is_prose, items(block))


def is_repeat(passage: str, seen: set[Any], sample: int = 1) -> bool:
    """Return whether more than half of the passage's shingles are in `seen`; add them to it.

    With `sample` above 1, hashes of one in so many shingles are used instead, the same ones in
    every passage, and at least one. So an exact repeat is still found, in less memory.
    """
    words = [word.lower() for word in WORD.findall(passage)]
    starts = range(max(1, len(words) - SHINGLE + 1))
    shingles: set[Any] = {" ".join(words[start : start + SHINGLE]) for start in starts}
    if sample > 1:
        hashes = {_hash(shingle.encode()) for shingle in shingles}
        shingles = {h for h in hashes if h % sample == 0} or {min(hashes)}
    n_seen = len(shingles & seen)
    seen |= shingles
    return 2 * n_seen > len(shingles)


def _hash(text: bytes) -> int:
    return zlib.adler32(text) << 32 | zlib.crc32(text)
