"""A prompt is prefilled once, and its samples begin with copies of its row.

Samples of a prompt stand next to each other in the list of sequences. Those that begin together are
copied from the first one's row, right after its prefill. For those that begin later, when a row has
come free, the prompt is kept in a cache of one row: samples begin in order, so that there is never
more than one prompt to keep. Shapes: n sequences that begin together, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apps.LT2.cache import ModelCache
from apps.LT2.inference.prompts import pack_prompts, score_prompts
from apps.LT2.inference.sequence import GeneratedSequence
from apps.LT2.kernel.documents import upload
from apps.LT2.transformer import LoopedTransformer


@dataclass
class KeptPrompt:
    """What the later samples of a prompt begin with."""

    sample: GeneratedSequence  # one of those that have begun; it has the prompt's scores
    logits_1V: Tensor


class PromptPrefill:
    """Fills rows of `cache` with prompts."""

    def __init__(
        self,
        model: LoopedTransformer,
        cache: ModelCache,
        one_row: Callable[[], ModelCache],
        *,
        score: bool,
    ):
        """one_row: makes a cache of one row as long as those of `cache`, if one is needed; score:
        give the sequences the scores of their prompts, which takes logits for each token."""
        self.model, self.cache, self.one_row, self.score = model, cache, one_row, score
        self.device = model.tok_embeddings.weight.device
        self.kept: KeptPrompt | None = None
        self.kept_row: ModelCache | None = None  # allocated when a prompt is first kept

    def begin(
        self,
        new: Sequence[GeneratedSequence],
        rows: Sequence[int],
        following: GeneratedSequence | None,
    ) -> Tensor:
        """Logits (n, V) after the prompts of `new`, which `rows` hold from then on. `following` is
        the sequence that will begin after these."""
        kept = self.kept
        n_kept = 0 if kept is None else sum(s.shares_prompt(kept.sample) for s in new)
        logits = []
        if kept is not None and n_kept:
            logits.append(self._begin_with(kept, new[:n_kept], rows[:n_kept]))
        if n_kept < len(new):
            logits.append(self._prefill(new[n_kept:], rows[n_kept:]))
        logits_nV = torch.cat(logits)
        if following is None or not following.shares_prompt(new[-1]):
            self.kept = None
        elif n_kept < len(new):
            self._keep(new[-1], rows[-1], logits_nV[-1:].clone())
        return logits_nV

    def _keep(self, sample: GeneratedSequence, row: int, logits_1V: Tensor) -> None:
        if self.kept_row is None:
            self.kept_row = self.one_row()
        self.kept_row.copy_rows([0], self.cache, [row])
        self.kept = KeptPrompt(sample, logits_1V)

    def _begin_with(
        self, kept: KeptPrompt, new: Sequence[GeneratedSequence], rows: Sequence[int]
    ) -> Tensor:
        assert self.kept_row is not None, "a prompt without a row"
        self.cache.copy_rows(rows, self.kept_row, [0] * len(rows))
        for sequence in new:
            sequence.take_scores(kept.sample)
        return kept.logits_1V.expand(len(new), -1)

    def _prefill(self, new: Sequence[GeneratedSequence], rows: Sequence[int]) -> Tensor:
        """Each prompt is read once, and copied to the other rows of its samples."""
        changes = [not b.shares_prompt(a) for a, b in itertools.pairwise(new)]
        prompt_of = list(itertools.accumulate(changes, initial=0))  # of each sequence
        first = [prompt_of.index(n) for n in range(prompt_of[-1] + 1)]  # sequence of each prompt
        logits = self._read([new[i] for i in first], [rows[i] for i in first])
        copies = [i for i in range(len(new)) if i != first[prompt_of[i]]]
        if not copies:
            return logits
        origins = [first[prompt_of[i]] for i in copies]
        self.cache.copy_rows([rows[i] for i in copies], self.cache, [rows[i] for i in origins])
        for i, origin in zip(copies, origins, strict=True):
            new[i].take_scores(new[origin])
        return logits[upload(prompt_of, logits.device, torch.int64)]

    def _read(self, new: Sequence[GeneratedSequence], rows: Sequence[int]) -> Tensor:
        """Prefill the prompts, packed; logits after each."""
        self.cache.reset(rows)
        tokens_1T, cu_seqlens = pack_prompts([s.prompt for s in new], self.device)
        logits = self.model.prefill(
            tokens_1T, self.cache, cu_seqlens=cu_seqlens, rows=rows, last_only=not self.score
        )
        if not self.score:
            return logits[:, 0]
        scores = score_prompts(logits[0], tokens_1T[0], [len(s.prompt) for s in new])
        for sequence, (loglikelihood, greedy) in zip(new, scores, strict=True):
            sequence.loglikelihood, sequence.greedy = loglikelihood, greedy
        return logits[0, cu_seqlens[1:].long() - 1]
