"""Copy a random text (https://arxiv.org/abs/2402.01032): x1 ... xn COPY x1 ... xn.

The answers are the n tokens after COPY. The example ends before the last of them.
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
class Copy(Task):
    name: ClassVar[str] = "copy"
    n: int = 16
    vocab_size: int = 26  # letters; COPY is the next token

    def __post_init__(self) -> None:
        require(self.n >= 1, "n", self.n, "1 or more")
        require(self.vocab_size >= 2, "vocab_size", self.vocab_size, "2 or more")

    @property
    def n_tokens(self) -> int:
        return self.vocab_size + 1

    @property
    def seq_len(self) -> int:
        return 2 * self.n

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        text = draws.integers(self.vocab_size, self.n)
        copy = np.full((len(text), 1), self.vocab_size)
        tokens = np.concatenate([text, copy, text[:, :-1]], axis=1)
        return tokens, np.concatenate([np.full_like(text, NO_TARGET), text], axis=1)
