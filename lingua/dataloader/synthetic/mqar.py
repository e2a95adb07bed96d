"""Multi-query associative recall (Zoology, https://arxiv.org/abs/2312.04927).

    k v  k v  ...  k v    num_kv_pairs keys and values, all different
    x k  x x  x k  ...    each key again at some later place, where its value is the answer

The places are drawn without replacement, with probability proportional to d ** (power_a - 1) at
distance d: small powers ask soon. Other tokens x are random, or 0 without random_non_queries.
Unlike in Zoology's code, the order of the pairs says nothing about that of the queries.
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
class MQAR(Task):
    name: ClassVar[str] = "mqar"
    num_kv_pairs: int = 8
    input_seq_len: int = 64
    vocab_size: int = 8192  # the first half are keys, except 0, and the second half values
    power_a: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        n, length, size = self.num_kv_pairs, self.input_seq_len, self.vocab_size
        require(n >= 1, "num_kv_pairs", n, "1 or more")
        require(length % 2 == 0, "input_seq_len", length, "even")
        fits = f"at most a quarter of input_seq_len={length}: a pair and its query take 4 tokens"
        require(4 * n <= length, "num_kv_pairs", n, fits)
        fits = f"at most {size // 2 - 1}, the number of keys with vocab_size={size}"
        require(n <= size // 2 - 1, "num_kv_pairs", n, fits)
        require(self.power_a > 0, "power_a", self.power_a, "above 0")

    @property
    def n_tokens(self) -> int:
        return self.vocab_size

    @property
    def seq_len(self) -> int:
        return self.input_seq_len

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        n, first_value = self.num_kv_pairs, self.vocab_size // 2
        keys = 1 + draws.sample(first_value - 1, n)
        values = first_value + draws.sample(self.vocab_size - first_value, n)
        distances = np.arange(1, (self.input_seq_len - 2 * n) // 2 + 1)
        # The order of exponential times with these rates is that of weighted draws.
        times = -np.log(draws.floats(len(distances))) / distances ** (self.power_a - 1)
        places = 2 * n + 2 * times.argsort(axis=1)[:, :n]
        places = np.take_along_axis(places, draws.sample(n, n), axis=1)
        if self.random_non_queries:
            tokens = draws.integers(self.vocab_size, self.input_seq_len)
        else:
            tokens = np.zeros((len(keys), self.input_seq_len), dtype=np.int64)
        tokens[:, 0 : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = keys, values
        targets = np.full_like(tokens, NO_TARGET)
        np.put_along_axis(tokens, places, keys, axis=1)
        np.put_along_axis(targets, places, values, axis=1)
        return tokens, targets
