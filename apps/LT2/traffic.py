"""What a decode step must move between memory and the device, in bytes: its floor in time.

    weights   of every (loop, layer), read anew in each loop: a stack is larger than any cache of a
              device, so that a loop finds none of the weights that the one before has read
    head      once, and a row of the embedding for each sequence
    caches    of every (loop, layer) and sequence, as the mixers say (`Mixer.step_bytes`)

Activations and logits are left out: they are small, and kernels may keep them on the chip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from apps.LT2.block import Block
from apps.LT2.transformer import LoopedTransformer


@dataclass(frozen=True)
class StepTraffic:
    weights: int  # the stack, once a loop
    head: int  # head, final norm and the rows of the embedding
    caches: int

    @property
    def total(self) -> int:
        return self.weights + self.head + self.caches


def step_traffic(
    model: LoopedTransformer, batch_size: int, seqlen: int, cache_dtype: torch.dtype
) -> StepTraffic:
    """Of one step that gives each of `batch_size` sequences of `seqlen` tokens one token more.

    Weights count in the dtypes that the model holds them in.
    """
    weights = 0 if model.rho is None else model.rho.nbytes
    per_sequence = 0
    for loop in model.layout:
        for block, spec in zip(model.layers, loop, strict=True):
            assert isinstance(block, Block)
            mixer = block.mixer(spec)
            idle = sum(_nbytes(other) for other in block.mixers() if other is not mixer)
            weights += _nbytes(block) - idle
            per_sequence += mixer.step_bytes(seqlen, cache_dtype, spec.window)
    row = model.args.dim * model.tok_embeddings.weight.element_size()
    head = model.head_weight.nbytes + _nbytes(model.norm) + batch_size * row
    return StepTraffic(weights, head, batch_size * per_sequence)


def _nbytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
