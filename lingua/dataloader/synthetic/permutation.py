"""Composition of permutations: the word problem of a group (https://arxiv.org/abs/2404.08819).

A token is an element of the group. The answer at position i is the product of elements 1 to i:
apply the first one first. S5 and A5 are not solvable, so constant depth isn't enough for long
words, if TC0 is not NC1. Z60 is as large as A5 and easy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from math import factorial
from typing import TYPE_CHECKING, ClassVar

from lingua.dataloader.packing import NO_TARGET
from lingua.dataloader.synthetic.random import Draws
from lingua.dataloader.synthetic.task import Task, require

if TYPE_CHECKING:
    import numpy as np

GROUP = re.compile(r"[SA][3-6]|Z[1-9]\d{0,2}")


@dataclass(frozen=True)
class Permutation(Task):
    name: ClassVar[str] = "permutation"
    n: int = 16  # elements of a word
    group: str = "A5"
    answers: str = "all"

    def __post_init__(self) -> None:
        require(self.n >= 1, "n", self.n, "1 or more")
        groups = "S or A with 3 to 6, or Z with 1 to 999, as in S5, A5, Z60"
        require(GROUP.fullmatch(self.group) is not None, "group", self.group, groups)
        require(self.answers in ("all", "last"), "answers", self.answers, "all or last")

    @property
    def n_tokens(self) -> int:
        kind, degree = self.group[0], int(self.group[1:])
        return {"Z": degree, "A": factorial(degree) // 2, "S": factorial(degree)}[kind]

    @property
    def seq_len(self) -> int:
        return self.n

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        tokens, product = draws.integers(self.n_tokens, self.n), product_table(self.group)
        targets = tokens.copy()
        for i in range(1, self.n):
            targets[:, i] = product[targets[:, i - 1], tokens[:, i]]
        if self.answers == "last":
            targets[:, :-1] = NO_TARGET
        return tokens, targets


def elements(group: str) -> list[tuple[int, ...]]:
    """Return the permutations of S<n> or A<n> in lexical order: x goes to element[x]."""
    degree = int(group[1:])
    found = list(permutations(range(degree)))
    if group[0] == "S":
        return found
    pairs = [(i, j) for j in range(degree) for i in range(j)]
    return [p for p in found if sum(p[i] > p[j] for i, j in pairs) % 2 == 0]


@cache
def product_table(group: str) -> np.ndarray:
    """Return the number of `first, then second` at [first, second], (|G|, |G|) int64."""
    import numpy as np

    if group[0] == "Z":
        numbers = np.arange(int(group[1:]))
        return (numbers[:, None] + numbers) % len(numbers)
    found = np.array(elements(group))
    digits = 10 ** np.arange(found.shape[1])[::-1]  # lexical order is numerical order
    return np.searchsorted(found @ digits, found[:, found].transpose(1, 0, 2) @ digits)
