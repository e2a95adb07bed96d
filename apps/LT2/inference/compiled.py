"""Compile the prefill and the decode step of each layer, which fuses norms, gates and rotations.

Layers of the same mixer and window share compiled code. Code with constant shapes is compiled again
for each batch size and length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from apps.LT2.transformer import LoopedTransformer

MAX_VARIANTS = 64  # compiled versions of one function, before torch refuses more


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
        compile_layers(model, "prefill", dynamic=True)
    if step:
        compile_layers(model, "step", dynamic=None)
    try:
        yield
    finally:
        for name in names:
            for block in model.layers:
                delattr(block, name)


def compile_layers(model: LoopedTransformer, name: str, *, dynamic: bool | None) -> None:
    """Compile the method `name` of every layer, "prefill" or "step", in place.

    dynamic=False is for constant shapes. A prefill that continues a sequence is then compiled again
    for each length of the past.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_VARIANTS)
    for block in model.layers:
        assert name not in vars(block), f"{name} is already compiled"
        method, fullgraph = getattr(block, name), name == "step"
        setattr(block, name, torch.compile(method, dynamic=dynamic, fullgraph=fullgraph))
