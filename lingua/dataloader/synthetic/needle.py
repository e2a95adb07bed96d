"""Needles in a haystack, on tokens instead of text: single and multi-key (RULER, 2404.06654).

    w w w NEEDLE k v v w w ...    num_needle_k needles at random places between random words w
    QUERY k v v                   num_needle_q times at the end; the answers are the values

Each needle has its own key and a value of needle_len tokens. Keys and values are words, too. The
example ends before the last token of the last value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lingua.dataloader.packing import NO_TARGET
from lingua.dataloader.synthetic.random import Draws
from lingua.dataloader.synthetic.task import Task, require

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Needle(Task):
    name: ClassVar[str] = "needle"
    input_seq_len: int = 128
    num_needle_k: int = 1
    num_needle_q: int = 1
    needle_len: int = 1
    vocab_size: int = 64  # words; NEEDLE and QUERY are the next tokens

    def __post_init__(self) -> None:
        k, q, n = self.num_needle_k, self.num_needle_q, self.needle_len
        require(k >= 1, "num_needle_k", k, "1 or more")
        at_most = f"at most vocab_size={self.vocab_size}, since each needle has another key"
        require(k <= self.vocab_size, "num_needle_k", k, at_most)
        require(1 <= q <= k, "num_needle_q", q, f"from 1 to num_needle_k={k}")
        require(n >= 1, "needle_len", n, "1 or more")
        shortest = k * (2 + n) + q * (1 + n)
        wanted = f"at least {shortest} for these needles (num_needle_k={k}, needle_len={n}) and "
        wanted += f"their queries (num_needle_q={q})"
        require(shortest <= self.input_seq_len, "input_seq_len", self.input_seq_len, wanted)

    @property
    def n_tokens(self) -> int:
        return self.vocab_size + 2

    @property
    def seq_len(self) -> int:
        return self.input_seq_len

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        k, q, n = self.num_needle_k, self.num_needle_q, self.needle_len
        keys, values = draws.sample(self.vocab_size, k), draws.integers(self.vocab_size, k, n)
        n_hay = self.input_seq_len - q * (1 + n)
        words = draws.integers(self.vocab_size, n_hay)
        # Of the words and needles in a row, k are needles. Each is 1 + n tokens longer than a word.
        order = np.sort(draws.sample(n_hay - k * (1 + n), k), axis=1)
        starts = order + np.arange(k) * (1 + n)
        needle = np.full((len(keys), k, 1), self.vocab_size)
        needles = np.concatenate([needle, keys[..., None], values], axis=2)
        places = starts[..., None] + np.arange(2 + n)
        np.put_along_axis(words, places.reshape(len(keys), -1), needles.reshape(len(keys), -1), 1)

        asked = draws.sample(k, q)
        answers = np.take_along_axis(values, asked[..., None], axis=1)
        query = np.full((len(keys), q, 1), self.vocab_size + 1)
        asked_keys = np.take_along_axis(keys, asked, axis=1)[..., None]
        queries = np.concatenate([query, asked_keys, answers[..., :-1]], axis=2)
        targets = np.concatenate([np.full_like(query, NO_TARGET), answers], axis=2)
        queries, targets = queries.reshape(len(keys), -1), targets.reshape(len(keys), -1)
        return (
            np.concatenate([words, queries], axis=1),
            np.concatenate([np.full_like(words, NO_TARGET), targets], axis=1),
        )
