"""The copies of skipped loops in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def copy_slots_naive(copies: Sequence[Any]) -> None:
    """Run `SlotCopy`s in order, in place."""
    length_B = copies[0].source_length_B  # the same in all
    row, last_B = torch.arange(len(length_B), device=length_B.device), length_B - 1
    slot_B = {}  # by number of slots
    for copy in copies:
        for n in (copy.slots.shape[1], copy.source.shape[1]):
            if n not in slot_B:
                slot_B[n] = last_B % n
        n, n_source = copy.slots.shape[1], copy.source.shape[1]
        copy.slots[row, slot_B[n]] = copy.source[row, slot_B[n_source]]
        copy.length_B.copy_(length_B)
