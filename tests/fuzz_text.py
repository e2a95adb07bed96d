"""Random damage to texts and values: what people, editors, disks and other programs do to files."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SECONDS = 30  # after which a case counts as hanging; the longest takes less than one

# As written in YAML. Nothing here is what most options want, and each is what some option takes.
WORDS = """
0 1 -1 2 3 7 64 4.5 -0.5 0.1 1e3 1e-3 1e30 -1e30 1e999 99999999999999999999 nan .nan .inf null ~
true false yes no on x full window gdn dsa mamba2 4:1 1:0 0:0 bookend:1 gdn*3 8->full ${x.y}
${steps} [] [1] [a,b] {} {a:1} '' "" "a\nb" é 漢 0x10 010 1_000 2024-01-01 auto naive sdpa fp32 bf16
disabled loop none 2147483648 4294967296 18446744073709551616 /nowhere . !!str !!python/none &a *a |
"""
NUMERALS = "0 1 -1 2 3 5 7 10 16 64 100 4096 4.5 -0.5 0.1 0.9 1e3 1e-3 1e30 2147483648 1_000"
PUNCTUATION = ": - # ' \" { } [ ] &x *x , % @ ` ... \ufeff <<:"
VALUES = WORDS.split()
VALUES += ["9" * 5000, "[" * 5000, "a" * 100_000, "gdn*" + "9" * 30, "9" * 5000 + ":1", "- x\n- y"]
NUMBERS = NUMERALS.split()
PIECES = [*PUNCTUATION.split(" "), " ", "  ", "\t", "\n", "\0", "\u2028", "? ", "---\n"]


def fuzz_count(default: int) -> int:
    """How many cases to run: LT2_FUZZ raises the number that CI runs."""
    return int(os.environ.get("LT2_FUZZ", default))


def other_value(before: str, rng: random.Random) -> str:
    """Another value as YAML, two times of three of the same kind, so that some are accepted."""
    if rng.randrange(3):
        if before in ("true", "false"):
            return rng.choice(["true", "false", "yes", "0"])
        if before[:1].isdigit():
            return rng.choice(NUMBERS)
    return rng.choice(VALUES)


def damage_text(text: str, rng: random.Random) -> str:
    """One small accident: characters or lines lost, doubled, exchanged or put in."""
    lines = text.splitlines(keepends=True)
    i, j = rng.randrange(len(text)), rng.randrange(len(lines))
    n = rng.choice([1, 1, 2, 5, 40])
    match rng.randrange(8):
        case 0:
            return text[:i] + text[i + n :]
        case 1:
            return text[:i] + rng.choice(PIECES) + text[i:]
        case 2:
            return text[:i] + chr(rng.randrange(1, 0x250)) + text[i + 1 :]
        case 3:
            return "".join(lines[:j] + lines[j + 1 :])
        case 4:
            return "".join(lines[:j] + [lines[j]] + lines[j:])
        case 5:
            k = rng.randrange(len(lines))
            lines[j], lines[k] = lines[k], lines[j]
            return "".join(lines)
        case 6:
            lines[j] = rng.choice([" ", "  ", "    ", "\t"]) + lines[j]
            return "".join(lines)
        case _:
            return text[:i]


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
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
    def stop(signum: int, frame: FrameType | None) -> Any:
        raise AssertionError(f"{case!r} runs for more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
