"""Prose is kept, code is not, and repeats are found, also with few of the shingles."""

from __future__ import annotations

import pytest

from lingua.prepare.prose import is_prose, is_repeat

SENTENCE = (
    "The {} is read from the file that was given, and it is then kept for the other {} users."
)


@pytest.mark.parametrize(
    "passage, prose",
    [
        (SENTENCE.format("name", "two"), True),
        ("Return the number of bytes that were written to the stream.", True),
        ("for i in range(10): total += values[i] * weights[i]; print(total, i, n).", False),
        ("open(file, mode='r', buffering=-1, encoding=None) -> file object.", False),
        ("| name | the type | the default | what it is for | of the field |.", False),
        ("The [name] of the [file] is <one> of the {many} in the [list] of the |paths|.", False),
        ("Amsterdam, Berlin, Copenhagen, Dublin, Edinburgh, Florence, Geneva, Helsinki.", False),
        ("Too short to keep.", False),
        ("A heading of the section without a full stop in it", False),
    ],
)
def test_is_prose(passage, prose):
    assert is_prose(passage) == prose


@pytest.mark.parametrize("sample", [1, 4])
def test_repeats_of_any_length_are_found(sample):
    seen = set()
    texts = [
        " ".join(f"w{chr(97 + i)}{chr(97 + j)}" for j in range(n))
        for i, n in enumerate([3, 6, 7, 26, 26])
    ]
    assert not any(is_repeat(text, seen, sample) for text in texts)
    assert all(is_repeat(text, seen, sample) for text in texts)
    assert is_repeat(" ".join(texts[3].split()[:-1]) + " other", seen, sample)
    assert not is_repeat("other " + " ".join(reversed(texts[3].split())), seen, sample)


def test_a_sample_takes_less_memory():
    text = " ".join(f"{a}{b}" for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst")
    kept = [set(), set()]
    for seen, sample in zip(kept, (1, 4), strict=True):
        is_repeat(text, seen, sample)
    assert len(kept[0]) == 395 and 50 < len(kept[1]) < 150
