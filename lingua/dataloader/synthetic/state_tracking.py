"""State tracking and recall: swap pointers into an array of bits, then read through one of them.

    a b  a b  ...  a b    n bits, each after its address, in order of the addresses
    p a  p a  ...  p a    pointers, each with its own random address of the array
    swap p p  ...         n_swaps swaps of two different pointers
    query p               the answer is the bit at the address that this pointer has now

The synthetic curriculum of LT2 (https://arxiv.org/abs/2605.20670, section 3.6), with n_swaps = n
and five pointers. The paper doesn't give its tokens; these are ours. The addresses of an array are
a random subset of `n_addresses`, or its first n: the vocabulary is the same for every n.

With answers=all, each address of a pointer has its bit as an answer, and each swap the bit that its
first pointer has after it. The tokens are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lingua.dataloader.packing import NO_TARGET
from lingua.dataloader.synthetic.random import Draws
from lingua.dataloader.synthetic.task import Task, require

if TYPE_CHECKING:
    import numpy as np

SWAP, QUERY, FIRST_POINTER = 2, 3, 4  # 0 and 1 are the bits


@dataclass(frozen=True)
class StateTracking(Task):
    name: ClassVar[str] = "state_tracking"
    n: int = 16
    n_swaps: int | None = None  # null = n
    n_pointers: int = 5
    n_addresses: int = 256
    random_addresses: bool = True
    answers: str = "last"

    def __post_init__(self) -> None:
        require(self.n_pointers >= 2, "n_pointers", self.n_pointers, "at least 2")
        least = f"at least n_pointers={self.n_pointers}, and at most n_addresses={self.n_addresses}"
        require(self.n_pointers <= self.n <= self.n_addresses, "n", self.n, least)
        require(self.swaps >= 0, "n_swaps", self.n_swaps, "0 or more, or null for n")
        require(self.answers in ("all", "last"), "answers", self.answers, "all or last")

    @property
    def swaps(self) -> int:
        return self.n if self.n_swaps is None else self.n_swaps

    @property
    def n_tokens(self) -> int:
        return FIRST_POINTER + self.n_pointers + self.n_addresses

    @property
    def seq_len(self) -> int:
        return 2 * self.n + 2 * self.n_pointers + 3 * self.swaps + 2

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        n, n_pointers, n_swaps = self.n, self.n_pointers, self.swaps
        addresses = np.arange(n)[None].repeat(len(draws.state_B), axis=0)
        if self.random_addresses:
            addresses = np.sort(draws.sample(self.n_addresses, n), axis=1)
        bits = draws.integers(2, n)
        places = draws.sample(n, n_pointers)  # of the pointers in the array
        first = draws.integers(n_pointers, n_swaps)
        second = (first + 1 + draws.integers(n_pointers - 1, n_swaps)) % n_pointers
        asked = draws.integers(n_pointers)
        rows = np.arange(len(asked))

        tokens = np.empty((len(rows), self.seq_len), dtype=np.int64)
        first_address = FIRST_POINTER + n_pointers
        array, rest = tokens[:, : 2 * n], tokens[:, 2 * n :]
        array[:, 0::2], array[:, 1::2] = first_address + addresses, bits
        start, swaps = rest[:, : 2 * n_pointers], rest[:, 2 * n_pointers : -2]
        start[:, 0::2] = FIRST_POINTER + np.arange(n_pointers)
        start[:, 1::2] = first_address + np.take_along_axis(addresses, places, axis=1)
        swaps[:, 0::3] = SWAP
        swaps[:, 1::3], swaps[:, 2::3] = FIRST_POINTER + first, FIRST_POINTER + second
        tokens[:, -2], tokens[:, -1] = QUERY, FIRST_POINTER + asked

        targets = np.full_like(tokens, NO_TARGET)
        of_starts, of_swaps = np.split(targets[:, 2 * n : -2], [2 * n_pointers], axis=1)
        if self.answers == "all":
            of_starts[:, 1::2] = np.take_along_axis(bits, places, axis=1)
        for i, (p, q) in enumerate(zip(first.T, second.T, strict=True)):
            places[rows, p], places[rows, q] = places[rows, q], places[rows, p]
            if self.answers == "all":
                of_swaps[:, 3 * i + 2] = bits[rows, places[rows, p]]
        targets[:, -1] = bits[rows, places[rows, asked]]
        return tokens, targets
