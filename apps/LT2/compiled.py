"""torch.compile for prefill and decode, a layer at a time: norms, gates and rotations are fused."""

from __future__ import annotations

import torch

from apps.LT2.block import Block
from apps.LT2.transformer import LoopedTransformer

# Layers share compiled code. Each family of mixers and each window is one piece of it, for each
# batch size and each length of a cache.
MAX_VARIANTS = 64


def compile_inference(model: LoopedTransformer) -> None:
    """Compile `prefill` and `step` of every layer, in place; the first call at a shape takes long.

    A step is one piece, as a CUDA graph needs it anyway. A prefill looks at what is cached and is
    compiled around that. Shapes are taken as constants.
    """
    torch._dynamo.config.recompile_limit = MAX_VARIANTS
    for block in model.layers:
        assert isinstance(block, Block)
        block.prefill = torch.compile(block.prefill, dynamic=False)
        block.step = torch.compile(block.step, dynamic=False, fullgraph=True)
