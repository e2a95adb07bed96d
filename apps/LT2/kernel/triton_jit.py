"""Triton where it is installed, so that a module of kernels can be imported anywhere.

    from apps.LT2.kernel.triton_jit import jit, tl, triton

Without it the three are there, and no kernel can be called. Types are not checked in kernels: their
modules begin with the `pyright:` line of this one.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton as _triton  # pyright: ignore[reportMissingImports]
    import triton.language as _tl  # pyright: ignore[reportMissingImports]
except ImportError:  # no CUDA here
    _triton = _tl = None

triton: Any = _triton  # so that types do not depend on whether it is installed
tl: Any = _tl


def jit(**options: Any) -> Callable[[Callable], Any]:
    """`triton.jit(**options)`."""
    return (lambda kernel: kernel) if triton is None else triton.jit(**options)
