"""Detect code that would sync with a GPU, on a machine without one.

Inside `no_waiting`, everything that reads a tensor on the host fails: `.item()`, `bool(x)`,
`.tolist()`, `.cpu()`, and operators whose output shape depends on values. It can't detect copies
from host to device; tests/gpu uses CUDA's own sync detection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# They return values to the host, or their output shape depends on values.
READS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique2,
    aten.bincount,
}
BY_MASK = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class WouldWait(AssertionError):
    pass


class _Catch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        counts_by_tensor = packet is aten.repeat_interleave and kwargs.get("output_size") is None
        masked = packet in BY_MASK and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if packet in READS or counts_by_tensor or masked:
            raise WouldWait(f"{func} needs values of a tensor on the host")
        return func(*args, **kwargs)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise WouldWait inside the block if code would sync with the device."""

    def refuse(name: str):
        def refused(self: Tensor, *_, **__):
            raise WouldWait(f"Tensor.{name} copies values to the host")

        return refused

    with pytest.MonkeyPatch.context() as patch, _Catch():
        # These read a CPU tensor without an operator.
        for name in ("tolist", "numpy", "cpu", "__array__"):
            patch.setattr(Tensor, name, refuse(name))
        yield
