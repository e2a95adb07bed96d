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

from apps.LT2.inference.prefill import PromptPrefill
from apps.LT2.inference.sampling import all_finite
from apps.LT2.inference.sequence import GeneratedSequence
from apps.LT2.kernel.documents import upload
from lingua.errors import UserError

# (logits of a row each, the sequences in these rows or None where one is free) -> token ids, any of
# the vocabulary where logits are NaN
Choose = Callable[[Tensor, Sequence[GeneratedSequence | None]], Tensor]
# tokens (B, 1) -> logits (B, 1, V), as `model.step`, and whether those of a row are finite, (B,)
Step = Callable[[Tensor], tuple[Tensor, Tensor]]
BROKEN = -1  # fetched in place of a token whose logits are not


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


class ContinuousBatch:
    """Runs sequences, in order, in the rows of one cache."""

    def __init__(self, prefill: PromptPrefill, step: Step, choose: Choose, *, eos_id: int):
        """`prefill` fills rows of its empty cache, and `step` moves that on."""
        self.cache, self.prefill = prefill.cache, prefill
        self.step, self.choose, self.eos_id = step, choose, eos_id
        n_rows = self.cache.batch_size
        self.rows: list[GeneratedSequence | None] = [None] * n_rows
        self.tokens_B1 = torch.zeros(n_rows, 1, dtype=torch.int64, device=prefill.device)

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
        """Put the next sequences into the rows that are free, with their first tokens."""
        free = [row for row, sequence in enumerate(self.rows) if sequence is None]
        new = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
        rows = free[: len(new)]
        logits_nV = self.prefill.begin(new, rows, waiting[0] if waiting else None)
        tokens_n = self.choose(logits_nV, new)
        self.tokens_B1[upload(rows, tokens_n.device, torch.int64), 0] = tokens_n
        for row, sequence in zip(rows, new, strict=True):
            self.rows[row] = sequence
        self._push(rows, tokens_n, all_finite(logits_nV))
        return new

    def _decode(self) -> list[GeneratedSequence]:
        """One step of all rows. Those without a sequence go along, and nobody looks at them."""
        full = [row for row, n in enumerate(self.cache.lengths) if n == self.cache.max_seqlen]
        if full:
            assert not any(self.rows[row] for row in full), "a sequence has outgrown its row"
            self.cache.reset(full)
        active = [sequence for sequence in self.rows if sequence is not None]
        logits_B1V, finite_B = self.step(self.tokens_B1)
        tokens_B = self.choose(logits_B1V[:, 0], self.rows)
        self.tokens_B1 = tokens_B[:, None]
        self._push(range(len(self.rows)), tokens_B, finite_B)
        return active

    def _push(self, rows: Sequence[int], tokens_n: Tensor, finite_n: Tensor) -> None:
        """Hand out tokens; a row whose sequence ends with its token is free.

        finite_n: whether their logits are. A UserError where those of a sequence are not: its token
        could be any. It comes with the tokens, since to ask for it would be to wait once more.
        """
        tokens = tokens_n.where(finite_n, BROKEN).tolist()
        given = [(row, s, t) for row, t in zip(rows, tokens, strict=True) if (s := self.rows[row])]
        if any(token == BROKEN for _, _, token in given):
            raise UserError(
                "the model's logits are NaN or infinite: the checkpoint is broken, or its numbers "
                "are too large for this dtype; dtype=fp32 tells"
            )
        for row, sequence, token in given:
            sequence.push(token, self.eos_id)
            if sequence.done:
                self.rows[row] = None
