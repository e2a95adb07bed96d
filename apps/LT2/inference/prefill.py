"""Prefill each prompt once; all its samples start from copies of its row.

Samples of a prompt are adjacent in the list of sequences. Samples that start together copy the
first one's row. For later samples, the prompt is kept in a cache of one row. Samples start in
order, so one kept prompt is enough. Shapes: n sequences that start together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apps.LT2.cache import ModelCache
from apps.LT2.inference.prompts import pack_prompts, score_prompts
from apps.LT2.inference.sequence import GeneratedSequence
from apps.LT2.kernel.documents import upload
from apps.LT2.transformer import LoopedTransformer


class KeptPrompt(NamedTuple):
    sample: GeneratedSequence  # an earlier sample, with the prompt's scores
    cache: ModelCache  # one row
    logits_1V: Tensor


class PromptPrefill:
    """Fill rows of `cache` with prompts."""

    def __init__(
        self,
        model: LoopedTransformer,
        cache: ModelCache,
        make_row: Callable[[], ModelCache],
        *,
        score: bool,
    ):
        """`make_row` allocates a cache of one row of the same length, if a prompt is kept.
        `score` scores the prompts, which computes logits for all their tokens."""
        self.model, self.cache, self.make_row, self.score = model, cache, make_row, score
        self.device = model.tok_embeddings.weight.device
        self.kept: KeptPrompt | None = None

    def begin(
        self,
        new: Sequence[GeneratedSequence],
        rows: Sequence[int],
        following: GeneratedSequence | None,
    ) -> Tensor:
        """Fill `rows` with the prompts of `new`; return the logits (n, V) after them.

        `following` is the next sequence to start after `new`.
        """
        kept = self.kept
        n_kept = sum(s.shares_prompt(kept.sample) for s in new) if kept else 0
        logits = []
        if kept and n_kept:
            self.cache.copy_rows(rows[:n_kept], kept.cache, [0] * n_kept)
            for sequence in new[:n_kept]:
                sequence.scores = kept.sample.scores
            logits.append(kept.logits_1V.expand(n_kept, -1))
        if n_kept < len(new):
            logits.append(self._prefill(new[n_kept:], rows[n_kept:]))
        logits_nV = torch.cat(logits)
        if n_kept < len(new) and following and following.shares_prompt(new[-1]):
            cache = kept.cache if kept else self.make_row()
            cache.copy_rows([0], self.cache, [rows[-1]])
            self.kept = KeptPrompt(new[-1], cache, logits_nV[-1:].clone())
        return logits_nV

    def _prefill(self, new: Sequence[GeneratedSequence], rows: Sequence[int]) -> Tensor:
        """Prefill each prompt once, and copy it to the rows of its other samples."""
        origin = list(range(len(new)))  # index of the first sample of the same prompt
        for i in range(1, len(new)):
            if new[i].shares_prompt(new[i - 1]):
                origin[i] = origin[i - 1]
        first = sorted(set(origin))
        logits = self._read([new[i] for i in first], [rows[i] for i in first])
        copies = [i for i in range(len(new)) if origin[i] != i]
        if not copies:
            return logits
        self.cache.copy_rows(
            [rows[i] for i in copies], self.cache, [rows[origin[i]] for i in copies]
        )
        for i in copies:
            new[i].scores = new[origin[i]].scores
        return logits[upload([first.index(i) for i in origin], logits.device, torch.int64)]

    def _read(self, new: Sequence[GeneratedSequence], rows: Sequence[int]) -> Tensor:
        """Prefill packed prompts; return the logits after each."""
        self.cache.reset(rows)
        tokens_1T, cu_seqlens = pack_prompts([s.prompt for s in new], self.device)
        logits = self.model.prefill(
            tokens_1T, self.cache, cu_seqlens=cu_seqlens, rows=rows, last_only=not self.score
        )
        if not self.score:
            return logits[:, 0]
        scores = score_prompts(logits[0], tokens_1T[0], [len(s.prompt) for s in new])
        for sequence, sequence_scores in zip(new, scores, strict=True):
            sequence.scores = sequence_scores
        return logits[0, cu_seqlens[1:].long() - 1]
