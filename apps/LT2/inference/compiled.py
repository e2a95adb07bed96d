"""torch.compile for prefill and decode, a layer at a time: norms, gates and rotations are fused.

Layers share code: there is one piece for each family of mixers, each window, and, where shapes are
constants of the compiled code, each batch size and length, whose first call takes long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from apps.LT2.block import Block
from apps.LT2.transformer import LoopedTransformer

MAX_VARIANTS = 64  # of one function, before torch refuses to compile more


def compile_prefill(model: LoopedTransformer) -> None:
    """Compile the prefill of every layer, in place, in one piece each.

    For prompts of few lengths that are prefilled at once: one that continues a row is compiled
    again for each length of the past.
    """
    _allow_variants()
    for block in model.layers:
        assert isinstance(block, Block)
        block.prefill = torch.compile(block.prefill, dynamic=False)


@contextmanager
def compiled_for_generation(
    model: LoopedTransformer, *, prefill: bool = False, step: bool = False
) -> Iterator[None]:
    """Inside, what is asked for of every layer is compiled for sequences of any lengths.

    prefill: numbers of tokens and of prompts are variables of the code; a single one has its own.
    step: the first cache's shape is a constant of the code, which is the faster one; from the
    second on, what differs is a variable. The model is afterwards as it was, but what was compiled
    is found again by the next one to come here.
    """
    options: dict[str, dict[str, Any]] = {}
    if prefill:
        options["prefill"] = {"dynamic": True}
    if step:
        options["step"] = {"dynamic": None, "fullgraph": True}
    if not options:
        yield
        return
    _allow_variants()
    for block in model.layers:
        for name, how in options.items():
            assert name not in vars(block), f"the {name} is compiled already"
            setattr(block, name, torch.compile(getattr(block, name), **how))
    try:
        yield
    finally:
        for block in model.layers:
            for name in options:
                delattr(block, name)


def compile_step(model: LoopedTransformer) -> None:
    """Compile the decode step of every layer, in place, in one piece each."""
    _allow_variants()
    for block in model.layers:
        assert isinstance(block, Block)
        block.step = torch.compile(block.step, dynamic=False, fullgraph=True)


def _allow_variants() -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_VARIANTS)
