"""A model that generates given tokens, regardless of its input."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.cache import ModelCache, packed_lengths

VOCAB = 258
AFTERWARDS = 0  # the token after the end of a script


class Scripted:
    """Generates one script for each prompt, in the order of prefilling."""

    def __init__(self, *scripts: list[int]):
        self.waiting = list(scripts)
        self.saying: dict[int, list[int]] = {}  # remaining tokens of each row
        self.n_steps = 0
        self.prefilled: list[list[int]] = []  # rows of each prefill
        self.tok_embeddings = torch.nn.Embedding(1, 1)
        self.args = SimpleNamespace(vocab_size=VOCAB)

    def named_buffers(self):
        return iter(())

    def init_cache(self, batch_size, max_seqlen, dtype=None) -> ModelCache:
        self.saying = {row: [] for row in range(batch_size)}
        return ModelCache([], max_seqlen, [0] * batch_size)

    def prefill(self, tokens, cache, *, cu_seqlens, rows, last_only) -> Tensor:
        cache.extend(rows, packed_lengths(tokens, cu_seqlens))
        self.prefilled.append(list(rows))
        for row in rows:
            self.saying[row] = list(self.waiting.pop(0))
        said = self._say(rows)
        if last_only:
            return said[:, None]
        logits = torch.zeros(1, tokens.shape[1], VOCAB)
        logits[0, (cu_seqlens[1:] - 1).long()] = said
        return logits

    def step(self, tokens, cache) -> Tensor:
        cache.extend(range(cache.batch_size), [1] * cache.batch_size)
        self.n_steps += 1
        return self._say(range(cache.batch_size))[:, None]

    def _say(self, rows) -> Tensor:
        said = [self.saying[row].pop(0) if self.saying[row] else AFTERWARDS for row in rows]
        return 10 * F.one_hot(torch.tensor(said), VOCAB).float()
