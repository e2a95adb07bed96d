"""A digest of a file that costs the same for a kilobyte and for 100 GB: its size, and samples.

It tells another file, and a change that runs through a text or changes its length. A change that
keeps the length and lies between the samples it does not see; a file no longer than the samples
are together is read whole, and any change to it is seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from lingua.args import UserError

N_BLOCKS = 64  # of a file: the first, the last, and between them at equal distances
BLOCK_BYTES = 64 * 2**10


def fingerprint(file: Path) -> str:
    """sha256, in hex, of a file's size and of its samples."""
    try:
        with open(file, "rb", buffering=0) as opened:
            size = opened.seek(0, 2)
            digest = hashlib.sha256(f"{size} bytes\n".encode())
            for begin in _block_begins(size):
                opened.seek(begin)
                digest.update(opened.read(BLOCK_BYTES))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); restore it") from None
    return digest.hexdigest()


def _block_begins(size: int) -> Iterator[int]:
    if size <= N_BLOCKS * BLOCK_BYTES:
        yield from range(0, size, BLOCK_BYTES)
        return
    for i in range(N_BLOCKS):
        yield (size - BLOCK_BYTES) * i // (N_BLOCKS - 1)
