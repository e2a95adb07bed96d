"""Update the caches of loops that a token skips: all layers and loops in two launches.

    skipped = SkippedLoops()
    skipped.copies.append(SlotCopy(...))       for each tensor of keys or values
    skipped.updates.append(DeltaUpdate(...))   for each state of Gated DeltaNet
    skipped.run()

Such an update is small: on a GPU its launch takes most of its time. Here, one kernel copies all
tokens, and one updates all states. They read the addresses from a table. Shapes: B rows, S slots,
C channels of a convolution of W inputs, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apps.LT2.kernel.decode_linear import KERNEL_DTYPES
from apps.LT2.kernel.gated_delta_rule.decode import fits
from apps.LT2.kernel.skipped_loops.naive import copy_slots_naive
from apps.LT2.kernel.skipped_loops.triton import launch_copies, launch_updates


class SlotCopy(NamedTuple):
    """Copy a cache's last token to the next slot of another cache.

    Both are rings: position p is in slot p % S.
    """

    source: Tensor  # (B, S', ...)
    slots: Tensor  # (B, S, ...), updated in place
    source_length_B: Tensor  # int64
    length_B: Tensor  # int64, tokens in `slots`; becomes source_length_B


class DeltaUpdate(NamedTuple):
    """Extend a state of Gated DeltaNet by one token, from the input of its convolution on."""

    x_BC: Tensor  # q, k and v before the convolution
    a_BH: Tensor  # input of the decay
    b_BH: Tensor  # input of the write strength
    conv_weight_CW: Tensor
    A_log_H: Tensor
    dt_bias_H: Tensor
    conv_state_BSC: Tensor  # the last W - 1 inputs of the convolution, updated in place
    state_BHKV: Tensor  # fp32, updated in place
    allow_neg_eigval: bool

    @property
    def has_kernel(self) -> bool:
        half = self.x_BC.is_cuda and self.x_BC.dtype in KERNEL_DTYPES
        states = self.conv_state_BSC, self.state_BHKV, self.conv_weight_CW
        contiguous = all(x.is_contiguous() for x in states) and self.x_BC.stride(-1) == 1
        return half and contiguous and fits(*self.state_BHKV.shape[-2:])


class SkippedLoops:
    """Updates that run together. All caches hold the same number of tokens in a row.

    Keep this object as long as a CUDA graph that captured `run`: it holds the tables.
    """

    def __init__(self) -> None:
        self.copies: list[SlotCopy] = []
        self.updates: list[DeltaUpdate] = []  # need `has_kernel`
        self.after: list[Callable[[], None]] = []  # what depends on the copies
        self._tables: list[tuple[Tensor, Tensor]] = []  # of captured launches: (device, host)
        self._n_numbers = 0  # in tables that were not captured

    def run(self) -> None:
        """Run the collected updates, and forget them. Doesn't sync."""
        if self.copies and self.copies[0].slots.is_cuda:
            launch_copies(self.copies, self._upload)
        elif self.copies:
            copy_slots_naive(self.copies)
        if self.updates:
            launch_updates(self.updates, self._upload)
        for call in self.after:
            call()
        self.copies, self.updates, self.after = [], [], []

    def reserve_tables(self, device: torch.device) -> None:
        """Allocate the tables of launches that will be captured; `run` has warmed up all of them.

        They can't be in the memory that the graphs share: a graph that was captured before would
        write its temporary results over them.
        """
        self._room = torch.empty(self._n_numbers, dtype=torch.int64, device=device)

    def fill_tables(self) -> None:
        """Fill the tables of captured launches, before the first replay."""
        for table, numbers in self._tables:
            table.copy_(numbers)

    def _upload(self, numbers: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """Return a table on the device. A capture can't copy from the host: it is filled later."""
        host = torch.tensor(numbers, dtype=torch.int64)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            self._n_numbers += host.numel()
            return host.to(device)
        room, self._room = self._room.split([host.numel(), len(self._room) - host.numel()])
        table = room.view(host.shape)
        self._tables.append((table, host))
        return table
