"""What a synthetic task is, and its split into examples for training and for validation.

A task is a dataclass of its options. Its examples all have the same length, and fill one row each:
nothing is packed or padded. Tokens with an answer have it as their target; others have NO_TARGET.

The split goes by a hash of the tokens: one example in HELD_OUT is for validation, under every seed,
and training never draws it. So even a task with few different examples leaks none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lingua.dataloader.synthetic.random import GAMMA, Draws, mix
from lingua.errors import UserError

if TYPE_CHECKING:
    import numpy as np

HELD_OUT = 16
MAX_ATTEMPTS = 1000  # the chance that a large task needs more is (15/16)**1000


@dataclass(frozen=True)
class Task(ABC):
    name: ClassVar[str]  # data.task.name

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Return the size of the vocabulary."""

    @property
    @abstractmethod
    def seq_len(self) -> int:
        """Return the number of tokens of an example."""

    @abstractmethod
    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and targets of B examples, both (B, seq_len) int64."""

    def examples(self, seed: int, indices: np.ndarray, *, held_out: bool) -> np.ndarray:
        """Return examples by their numbers, (B, seq_len, 2) int64: tokens, and their targets.

        An example depends on the task, `seed`, its number and `held_out` alone.
        """
        import numpy as np

        views = np.empty((len(indices), self.seq_len, 2), dtype=np.int64)
        todo = np.arange(len(indices))
        for attempt in range(MAX_ATTEMPTS):
            tokens, targets = self.draw(Draws(indices[todo], seed, held_out, attempt))
            fits = is_held_out(tokens) == held_out
            views[todo[fits], :, 0], views[todo[fits], :, 1] = tokens[fits], targets[fits]
            todo = todo[~fits]
            if not len(todo):
                return views
        use = "validation" if held_out else "training"
        raise UserError(
            f"data.task.name={self.name} has so few different examples with these options that "
            f"none is left for {use}; make the task larger"
        )


def is_held_out(tokens_BT: np.ndarray) -> np.ndarray:
    """Return whether each example is for validation, (B,) bool."""
    import numpy as np

    factors = mix(np.arange(1, tokens_BT.shape[1] + 1, dtype=np.uint64) * np.uint64(GAMMA))
    hashed = mix(((tokens_BT.astype(np.uint64) + np.uint64(1)) * factors).sum(axis=1))
    return hashed % np.uint64(HELD_OUT) == 0


def require(condition: bool, option: str, value: object, wanted: str) -> None:
    """Raise UserError for the value of an option of `data.task`."""
    if not condition:
        raise UserError(f"data.task.{option}={value} must be {wanted}")
