"""A prefill writes to a window's ring buffer independently of the order of writes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apps.LT2.mixers.attention import append

N_SLOTS = 4


class WriteInAnyOrder(TorchDispatchMode):
    """Fail if one call writes different values to one place: on a GPU either may be the last."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.index_put_:
            _, places, values = args[:3]
            written: dict[tuple[int, ...], list[float]] = {}
            for place, value in zip(zip(*places, strict=True), values, strict=True):
                key = tuple(int(index) for index in place)
                assert written.setdefault(key, value.tolist()) == value.tolist(), f"slot {key}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("held", [0, 3, 9])
@pytest.mark.parametrize("lengths", [[1, 4, 0], [5, 2, 9], [0, 0, 17], [8, 8, 8]])
def test_a_ring_keeps_the_last_tokens(held, lengths):
    rows = torch.tensor([2, 0, 1])
    slots, length_B = torch.full((3, N_SLOTS), -1.0), torch.full((3,), held)
    for position in range(held):
        slots[:, position % N_SLOTS] = position
    # A token's value is its position, plus 100 per sequence.
    new = torch.cat([100.0 * i + held + torch.arange(n) for i, n in enumerate(lengths)])
    with WriteInAnyOrder():
        append([(new[None], slots)], length_B, rows, torch.tensor(lengths))
    for i, (row, n) in enumerate(zip(rows.tolist(), lengths, strict=True)):
        assert length_B[row] == held + n
        for position in range(max(0, held + n - N_SLOTS), held + n):
            number = position if position < held else 100 * i + position
            assert slots[row, position % N_SLOTS] == number
