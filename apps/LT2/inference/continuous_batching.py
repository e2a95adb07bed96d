"""Continuous batching: when a sequence ends, the next one takes its row of the cache at once.

    row 0   aaaaaaaa|cccccccccc          time ->
    row 1   bbb|ddddddddd|eeeeeee        row 0 waits during the prefill of d, then both decode

Rows are independent and each sequence has its own random numbers, so a sequence gets the tokens
that it would get alone. Shapes: B rows of the cache, n sequences prefilled together, V vocabulary.
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

# (logits (n, V), the sequence of each row or None for a free row) -> token ids (n,)
Choose = Callable[[Tensor, Sequence[GeneratedSequence | None]], Tensor]
Step = Callable[[Tensor], Tensor]  # tokens (B, 1) -> logits (B, 1, V)
NOT_FINITE = -1  # replaces a token with NaN or infinite logits


def group_by_length(n_slots: Sequence[int], max_slots: int) -> list[list[int]]:
    """Partition indices into groups with one cache each; `n_slots` is what each sequence needs.

    The longest sequence sets the row length of its cache, so one long prompt would leave few rows.
    In a group, no row is more than twice as long as needed. Sequences that all fit into `max_slots`
    stay together.
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
    """Run sequences, in order, in the rows of one cache."""

    def __init__(
        self,
        prefill: PromptPrefill,
        step: Step,
        choose: Choose,
        *,
        eos_id: int,
        rows: list[GeneratedSequence | None] | None = None,
    ):
        """`step` must extend the cache of `prefill`, which is empty.

        `rows`, all None, always has the sequence of each row, for `step`.
        """
        self.cache, self.prefill = prefill.cache, prefill
        self.step, self.choose, self.eos_id = step, choose, eos_id
        n_rows = self.cache.batch_size
        self.rows: list[GeneratedSequence | None] = [None] * n_rows if rows is None else rows
        self.tokens_B1 = torch.zeros(n_rows, 1, dtype=torch.int64, device=prefill.device)

    def run(self, sequences: Sequence[GeneratedSequence]) -> Iterator[list[GeneratedSequence]]:
        """Yield the sequences that got a token or ended, after every prefill and every step."""
        waiting = deque(sequences)
        while True:
            while waiting and None in self.rows:
                yield self._admit(waiting)
            if not any(self.rows):
                return
            yield self._decode()

    def _admit(self, waiting: deque[GeneratedSequence]) -> list[GeneratedSequence]:
        """Start the next sequences in the free rows, with their first tokens."""
        free = [row for row, sequence in enumerate(self.rows) if sequence is None]
        new = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
        rows = free[: len(new)]
        logits_nV = self.prefill.begin(new, rows, waiting[0] if waiting else None)
        tokens_n = self.choose(logits_nV, new)
        self.tokens_B1[upload(rows, tokens_n.device, torch.int64), 0] = tokens_n
        for row, sequence in zip(rows, new, strict=True):
            self.rows[row] = sequence
        self._push(rows, tokens_n, logits_nV)
        return new

    def _decode(self) -> list[GeneratedSequence]:
        """Run one step of all rows. Free rows are computed too, and ignored."""
        full = [row for row, n in enumerate(self.cache.lengths) if n == self.cache.max_seqlen]
        if full:
            assert not any(self.rows[row] for row in full), "a sequence is longer than its row"
            self.cache.reset(full)
        active = [sequence for sequence in self.rows if sequence is not None]
        logits_BV = self.step(self.tokens_B1)[:, 0]
        tokens_B = self.choose(logits_BV, self.rows)
        self.tokens_B1 = tokens_B[:, None]
        self._push(range(len(self.rows)), tokens_B, logits_BV)
        return active

    def _push(self, rows: Sequence[int], tokens_n: Tensor, logits_nV: Tensor) -> None:
        """Append a token to the sequence in each of `rows`; free a row when its sequence ends.

        UserError if a sequence's logits aren't finite, as its token is then arbitrary. The flag
        travels with the tokens, which saves a second sync.
        """
        tokens = tokens_n.where(all_finite(logits_nV), NOT_FINITE).tolist()
        active = [(row, s, t) for row, t in zip(rows, tokens, strict=True) if (s := self.rows[row])]
        if any(token == NOT_FINITE for _, _, token in active):
            raise UserError(
                "the model's logits are NaN or infinite: the checkpoint is broken, or its values "
                "are too large for this dtype; try dtype=fp32"
            )
        for row, sequence, token in active:
            sequence.push(token, self.eos_id)
            if sequence.done:
                self.rows[row] = None
