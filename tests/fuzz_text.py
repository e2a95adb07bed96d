"""Random mistakes in text files and values, and random damage to binary files."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SECONDS = 30  # a longer case counts as a hang; most take less than one

# Values as YAML writes them. Each is valid for some option and wrong for most.
WORDS = """
0 1 -1 2 3 7 64 4.5 -0.5 0.1 1e1 1e-3 nan .nan .inf null ~ true false yes no on x full window gdn
dsa mamba2 4:1 1:0 0:0 bookend:1 gdn*3 8->full ${x.y} ${steps} [] [1] [a,b] {} {a:1} '' "" é 010
1_000 2024-01-01 auto naive sdpa fp32 bf16 disabled loop none /nowhere . !!str
"""
NUMERALS = "0 1 -1 2 3 5 7 10 16 64 100 4096 4.5 -0.5 0.1 0.9 1e1 1e-3 1_000"
VALUES, NUMBERS = WORDS.split(), NUMERALS.split()
TYPOS = [*": - # ' \" { } [ ] , % *", " ", "  ", "\t", "\n"]


def fuzz_count(default: int) -> int:
    """Return the number of cases; the environment variable LT2_FUZZ overrides the default."""
    return int(os.environ.get("LT2_FUZZ", default))


def other_value(before: str, rng: random.Random) -> str:
    """Draw another YAML value; two thirds have the same type, so that some are accepted."""
    if rng.randrange(3):
        if before in ("true", "false"):
            return rng.choice(["true", "false", "yes", "0"])
        if before[:1].isdigit():
            return rng.choice(NUMBERS)
    return rng.choice(VALUES)


def damage_text(text: str, rng: random.Random) -> str:
    """Make one editing mistake: characters or lines lost, repeated, swapped or indented."""
    lines = text.splitlines(keepends=True)
    i, j, k = rng.randrange(len(text)), rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(7):
        case 0:
            return text[:i] + text[i + rng.choice([1, 2, 5, 40]) :]
        case 1:
            return text[:i] + rng.choice(TYPOS) + text[i:]
        case 2:
            del lines[j]
        case 3:
            lines.insert(j, lines[j])
        case 4:
            lines[j], lines[k] = lines[k], lines[j]
        case 5:
            lines[j] = rng.choice([" ", "  ", "    ", "\t"]) + lines[j]
        case _:
            return text[:i]
    return "".join(lines)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Delete, insert, overwrite or zero some bytes, or truncate the data."""
    i, n = rng.randrange(len(data)), rng.choice([1, 1, 2, 8, 100])
    match rng.randrange(5):
        case 0:
            return data[:i] + data[i + n :]
        case 1:
            return data[:i] + rng.randbytes(n) + data[i:]
        case 2:
            return data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :]
        case 3:
            return data[:i] + b"\0" * n + data[i + n :]
        case _:
            return data[:i]


@contextmanager
def no_hang(case: object) -> Iterator[None]:
    """Fail if the block takes longer than SECONDS."""

    def stop(signum: int, frame: FrameType | None) -> Any:
        raise AssertionError(f"{case!r} runs for more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
