"""Fuse plain torch on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor


def fused_on_cuda(n_by_row: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Compile a function for CUDA tensors; elsewhere it runs unchanged.

    Its first `n_by_row` arguments have as many rows (dim 0), and all other sizes stay. One compiled
    version serves any number of rows: with a version for the first number and another one for all
    others, as by default, the rounding would depend on which number came first.
    """

    def fuse(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @cache
        def compiled() -> Callable[..., Tensor]:
            return torch.compile(function, fullgraph=True, dynamic=False)

        @wraps(function)
        def fused(*args: Any) -> Tensor:
            if not args[0].is_cuda or torch.compiler.is_compiling():
                return function(*args)
            for tensor in args[:n_by_row]:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            return compiled()(*args)

        return fused

    return fuse
