"""Compile the prefill and the decode step of each layer, which fuses norms, gates and rotations.

Layers of the same mixer and window share compiled code. Code with constant shapes is compiled again
for each batch size and length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from apps.LT2.transformer import LoopedTransformer

MAX_VARIANTS = 64  # compiled versions of one function, before torch refuses more


def compile_prefill(model: LoopedTransformer) -> None:
    """Compile the prefill of every layer for constant shapes, in place.

    For prompts of few lengths, each prefilled at once: a prefill that continues a sequence is
    compiled again for each length of the past.
    """
    _compile(model, "prefill", dynamic=False)


def compile_step(model: LoopedTransformer) -> None:
    """Compile the decode step of every layer for constant shapes, in place."""
    _compile(model, "step", dynamic=False, fullgraph=True)


@contextmanager
def compiled_for_generation(
    model: LoopedTransformer, *, prefill: bool = False, step: bool = False
) -> Iterator[None]:
    """Compile the prefill, the step or both for any lengths, and restore the model at the end.

    The prefill has dynamic shapes. The step has the constant shapes of the first cache, which is
    faster, and becomes dynamic with a second one. A later context reuses the compiled code.
    """
    names = ["prefill"] * prefill + ["step"] * step
    if prefill:
        _compile(model, "prefill", dynamic=True)
    if step:
        _compile(model, "step", dynamic=None, fullgraph=True)
    try:
        yield
    finally:
        for name in names:
            for block in model.layers:
                delattr(block, name)


def _compile(model: LoopedTransformer, name: str, **options: Any) -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_VARIANTS)
    for block in model.layers:
        assert name not in vars(block), f"{name} is already compiled"
        setattr(block, name, torch.compile(getattr(block, name), **options))
