"""Triton if installed, so that modules of kernels import anywhere.

    from apps.LT2.kernel.triton_jit import jit, tl, triton

Without Triton the three names exist, but no kernel can be called. Pyright cannot check kernels:
their modules start with the `pyright:` line of this one.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton as _triton  # pyright: ignore[reportMissingImports]
    import triton.language as _tl  # pyright: ignore[reportMissingImports]
except ImportError:
    _triton = _tl = None

triton: Any = _triton  # the same type with and without Triton
tl: Any = _tl


def jit(**options: Any) -> Callable[[Callable], Any]:
    """Call `triton.jit(**options)`; without Triton, return kernels unchanged."""
    return (lambda kernel: kernel) if triton is None else triton.jit(**options)
