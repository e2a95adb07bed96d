"""A fingerprint tells files apart at the cost of 4 MiB, whatever their length."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.dataloader.pretokenized import BLOCK_BYTES, N_BLOCKS, _block_begins, fingerprint
from lingua.errors import UserError

SAMPLED = N_BLOCKS * BLOCK_BYTES


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, SAMPLED - 1, SAMPLED])
def test_a_small_file_is_read_whole(size):
    begins = list(_block_begins(size))
    assert begins == list(range(0, size, BLOCK_BYTES)) and len(begins) <= N_BLOCKS


@pytest.mark.parametrize("size", [SAMPLED + 1, 2 * SAMPLED, 10**11])
def test_of_a_large_file_the_ends_are_read_and_samples_at_equal_distances(size):
    begins = list(_block_begins(size))
    assert len(begins) == N_BLOCKS and begins[0] == 0 and begins[-1] == size - BLOCK_BYTES
    steps = [b - a for a, b in zip(begins, begins[1:], strict=False)]
    assert min(steps) >= BLOCK_BYTES and max(steps) - min(steps) <= 1


def changed_at(file: Path, place: int) -> str:
    """The fingerprint of the file with another byte there."""
    text = bytearray(file.read_bytes())
    text[place] ^= 1
    other = file.with_name("other")
    other.write_bytes(text)
    return fingerprint(other)


@pytest.mark.parametrize("size", [3, BLOCK_BYTES + 3, SAMPLED, 2 * SAMPLED + 7])
def test_a_change_within_a_sample_or_of_the_length_is_seen(tmp_path, size):
    file, copy = tmp_path / "file", tmp_path / "copy"
    file.write_bytes(b"a" * size)
    copy.write_bytes(file.read_bytes())
    before = fingerprint(file)
    assert fingerprint(copy) == before
    begins = list(_block_begins(size))
    for place in (0, begins[len(begins) // 2], size - 1):
        assert changed_at(file, place) != before
    copy.write_bytes(b"a" * (size + 1))
    assert fingerprint(copy) != before


def test_a_change_between_samples_is_not_seen_as_the_docs_say(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"a" * 2 * SAMPLED)
    assert changed_at(file, BLOCK_BYTES) == fingerprint(file)


def test_a_file_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(UserError, match="gone: cannot be read .No such file.*restore it"):
        fingerprint(tmp_path / "gone")
