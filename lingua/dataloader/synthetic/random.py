"""Random numbers of many examples at once, each from its own stream.

Stream i is SplitMix64 (Steele, Lea, Flood 2014) from a state that hashes (seed, i, ...). So an
example depends on its number alone, not on the batch in which it is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

GAMMA = 0x9E3779B97F4A7C15
MAX_ARGSORT = 4  # times more candidates than choices: then sorting all of them is slower


def mix(x: np.ndarray) -> np.ndarray:
    """Return SplitMix64's hash of each element, uint64."""
    import numpy as np

    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Draws:
    """Draws for B examples in parallel; the first axis of each result is B."""

    def __init__(self, indices: np.ndarray, *seeds: int):
        """`indices` (B,) are the numbers of the examples; `seeds` choose the family of streams."""
        import numpy as np

        state = np.zeros(1, dtype=np.uint64)
        for seed in seeds:
            state = mix((state + np.uint64(GAMMA)) ^ np.uint64(seed))
        self.state_B = mix((state + np.uint64(GAMMA)) ^ indices.astype(np.uint64))
        self.n_drawn = 0

    def words(self, *shape: int) -> np.ndarray:
        """Return uniform uint64 (B, *shape)."""
        import numpy as np

        n = int(np.prod(shape, dtype=np.int64))
        steps = np.arange(self.n_drawn + 1, self.n_drawn + n + 1, dtype=np.uint64)
        self.n_drawn += n
        return mix(self.state_B[:, None] + steps * np.uint64(GAMMA)).reshape(
            len(self.state_B), *shape
        )

    def integers(self, high: int, *shape: int) -> np.ndarray:
        """Return uniform int64 (B, *shape) in [0, high), for high below 2**32."""
        import numpy as np

        high_bits = self.words(*shape) >> np.uint64(32)
        return (high_bits * np.uint64(high) >> np.uint64(32)).astype(np.int64)

    def floats(self, *shape: int) -> np.ndarray:
        """Return uniform float64 (B, *shape) in (0, 1)."""
        import numpy as np

        return ((self.words(*shape) >> np.uint64(12)) + 0.5) * 2.0**-52

    def sample(self, n: int, k: int) -> np.ndarray:
        """Return k different numbers in [0, n) in random order, (B, k) int64."""
        import numpy as np

        if n <= MAX_ARGSORT * k:
            return self.words(n).argsort(axis=1)[:, :k]
        # Floyd's algorithm: a set of k numbers in k draws. Its order is not random.
        chosen = np.empty((len(self.state_B), k), dtype=np.int64)
        for i in range(k):
            largest = n - k + i
            drawn = self.integers(largest + 1)
            is_taken = (chosen[:, :i] == drawn[:, None]).any(axis=1)
            chosen[:, i] = np.where(is_taken, largest, drawn)
        return np.take_along_axis(chosen, self.words(k).argsort(axis=1), axis=1)
