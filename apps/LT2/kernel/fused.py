"""Fuse plain torch on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor


def fused_on_cuda(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function for CUDA tensors; elsewhere it runs unchanged."""

    @cache
    def compiled() -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=True)

    @wraps(function)
    def fused(x: Tensor, *args: Any) -> Tensor:
        if x.is_cuda and not torch.compiler.is_compiling():
            return compiled()(x, *args)
        return function(x, *args)

    return fused
