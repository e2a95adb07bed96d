"""Continuous batching: a row of the cache whose sequence has ended takes the next one at once.

    row 0   aaaaaaaa|cccccccccc          time ->
    row 1   bbb|ddddddddd|eeeeeee        d is prefilled while a waits for it, then both go on

Rows do not mix and a sequence brings its own random numbers, so that its tokens are those that it
gets alone. Shapes: B rows of the cache, n sequences that are prefilled together, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from apps.LT2.cache import ModelCache
from apps.LT2.packed_prompts import pack_prompts, score_prompts
from apps.LT2.sequence import GeneratedSequence
from apps.LT2.transformer import LoopedTransformer
from lingua.args import UserError

# (logits of a row each, the sequences in these rows or None where one is free) -> token ids
Choose = Callable[[Tensor, Sequence[GeneratedSequence | None]], Tensor]
Step = Callable[[Tensor], Tensor]  # tokens (B, 1) -> logits (B, 1, V), as `model.step`


def group_by_length(n_slots: Sequence[int], max_slots: int) -> list[list[int]]:
    """Sort places by what they need into groups, one for each cache.

    All rows of a cache are as long as the longest sequence in it. So that one long prompt does not
    leave room for few rows, a group has rows of which none is more than twice as long as needed;
    but for sequences that fit into `max_slots` all at once.
    """
    if len(n_slots) * max(n_slots, default=0) <= max_slots:
        return [list(range(len(n_slots)))] if n_slots else []
    groups: list[list[int]] = []
    for i in sorted(range(len(n_slots)), key=lambda i: -n_slots[i]):
        if not groups or 2 * n_slots[i] < n_slots[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    return sorted(sorted(group) for group in groups)


def check_finite(logits_nV: Tensor, sequences: Sequence[GeneratedSequence | None]) -> None:
    """UserError where a row with a sequence has none to choose from: its token would be any."""
    if logits_nV.isfinite().all():
        return
    broken = logits_nV.isfinite().all(-1).logical_not().tolist()
    if any(bad and sequence for bad, sequence in zip(broken, sequences, strict=True)):
        raise UserError(
            "the model's logits are NaN or infinite: the checkpoint is broken, or its numbers are "
            "too large for this dtype; dtype=fp32 tells"
        )


class ContinuousBatch:
    """Runs sequences, in order, in the rows of one cache."""

    def __init__(
        self,
        model: LoopedTransformer,
        cache: ModelCache,
        step: Step,
        choose: Choose,
        *,
        eos_id: int,
        score: bool,
    ):
        """`cache` is empty, `step` moves it on; score: give the sequences the scores of their
        prompts, which takes logits for each token of these."""
        self.model, self.cache, self.step, self.choose = model, cache, step, choose
        self.eos_id, self.score = eos_id, score
        self.device = model.tok_embeddings.weight.device
        self.rows: list[GeneratedSequence | None] = [None] * cache.batch_size
        self.tokens_B1 = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=self.device)

    def run(self, sequences: Sequence[GeneratedSequence]) -> Iterator[list[GeneratedSequence]]:
        """After every prefill and every step, those that have a token more, or are done."""
        waiting = deque(sequences)
        while True:
            while waiting and None in self.rows:
                yield self._admit(waiting)
            if not any(self.rows):
                return
            yield self._decode()

    def _admit(self, waiting: deque[GeneratedSequence]) -> list[GeneratedSequence]:
        """Prefill the next sequences, packed, into the rows that are free; their first tokens."""
        free = [row for row, sequence in enumerate(self.rows) if sequence is None]
        new = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
        rows = free[: len(new)]
        rows_n = torch.tensor(rows, device=self.device)
        self.cache.reset(rows)
        logits_nV = self._prefill(new, rows_n)
        for row, sequence in zip(rows, new, strict=True):
            sequence.done = sequence.max_gen_len == 0  # its scores are all that it is here for
            self.rows[row] = None if sequence.done else sequence
        tokens_n = self.choose(logits_nV, [self.rows[row] for row in rows])
        self.tokens_B1[rows_n, 0] = tokens_n
        self._push(rows, tokens_n)
        return new

    def _prefill(self, new: list[GeneratedSequence], rows_n: Tensor) -> Tensor:
        """Logits (n, V) after each prompt."""
        tokens_1T, cu_seqlens = pack_prompts([s.prompt for s in new], self.device)
        logits = self.model.prefill(
            tokens_1T, self.cache, cu_seqlens=cu_seqlens, rows=rows_n, last_only=not self.score
        )
        if self.score:
            scores = score_prompts(logits[0], tokens_1T[0], [len(s.prompt) for s in new])
            for sequence, (loglikelihood, greedy) in zip(new, scores, strict=True):
                sequence.loglikelihood, sequence.greedy = loglikelihood, greedy
            logits_nV = logits[0, cu_seqlens[1:].long() - 1]
        else:
            logits_nV = logits[:, 0]
        check_finite(logits_nV, new)
        return logits_nV

    def _decode(self) -> list[GeneratedSequence]:
        """One step of all rows. Those without a sequence go along, and nobody looks at them."""
        full = [row for row, n in enumerate(self.cache.lengths) if n == self.cache.max_seqlen]
        if full:
            assert not any(self.rows[row] for row in full), "a sequence has outgrown its row"
            self.cache.reset(full)
        active = [sequence for sequence in self.rows if sequence is not None]
        logits_BV = self.step(self.tokens_B1)[:, 0]
        check_finite(logits_BV, self.rows)
        tokens_B = self.choose(logits_BV, self.rows)
        self.tokens_B1 = tokens_B[:, None]
        self._push(range(len(self.rows)), tokens_B)
        return active

    def _push(self, rows: Sequence[int], tokens_n: Tensor) -> None:
        """Hand out tokens; a row whose sequence ends with its token is free."""
        for row, token in zip(rows, tokens_n.tolist(), strict=True):
            sequence = self.rows[row]
            if sequence is not None:
                sequence.push(token, self.eos_id)
                if sequence.done:
                    self.rows[row] = None
