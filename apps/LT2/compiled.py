"""torch.compile for prefill and decode, a layer at a time: norms, gates and rotations are fused.

Layers share code: there is one piece for each family of mixers, each window, and, where shapes are
constants of the compiled code, each batch size and length, whose first call takes long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from apps.LT2.block import Block
from apps.LT2.transformer import LoopedTransformer

MAX_VARIANTS = 64  # of one function, before torch refuses to compile more


def compile_prefill(model: LoopedTransformer) -> None:
    """Compile the prefill of every layer, in place, around its looks at what is cached.

    For prompts of few lengths that are prefilled at once: one that continues a row is compiled
    again for each length of the past.
    """
    _allow_variants()
    for block in model.layers:
        assert isinstance(block, Block)
        block.prefill = torch.compile(block.prefill, dynamic=False)


@contextmanager
def compiled_prefill(model: LoopedTransformer) -> Iterator[None]:
    """Inside, the prefill of every layer is compiled for packed prompts of any lengths.

    Numbers of tokens and of prompts are variables of the code; a single one has its own. The model
    is afterwards as it was, but what was compiled is found again by the next one to come here.
    """
    _allow_variants()
    for block in model.layers:
        assert isinstance(block, Block)
        assert "prefill" not in vars(block), "the prefill is compiled already"
        block.prefill = torch.compile(block.prefill, dynamic=True)
    try:
        yield
    finally:
        for block in model.layers:
            del block.prefill


def compile_step(model: LoopedTransformer) -> None:
    """Compile the decode step of every layer, in place, in one piece each."""
    _allow_variants()
    for block in model.layers:
        assert isinstance(block, Block)
        block.step = torch.compile(block.step, dynamic=False, fullgraph=True)


def _allow_variants() -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_VARIANTS)
