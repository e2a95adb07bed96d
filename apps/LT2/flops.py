"""What a model costs: parameters, which loops share, and FLOPs, which every loop pays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from apps.LT2.block import Block
from apps.LT2.transformer import LoopedTransformer


@dataclass(frozen=True)
class ParameterCount:
    embedding: int  # input embedding, and the head where it is not tied
    gates: int  # rho
    body: int  # everything else: mixers, feed-forward, norms

    @property
    def total(self) -> int:
        return self.embedding + self.gates + self.body


def count_parameters(model: LoopedTransformer) -> ParameterCount:
    """Each tensor once, however often it runs."""

    def n(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    embedding = n(model.tok_embeddings)
    if not model.args.weight_tying:
        embedding += n(model.output)
    gates = model.rho.numel() if model.rho is not None else 0
    return ParameterCount(embedding, gates, n(model) - embedding - gates)


def forward_flops_per_token(model: LoopedTransformer, seqlen: int) -> int:
    """Multiplications and additions of one forward pass, per token of a sequence of `seqlen`.

    Matrix products, attention over the keys a token sees (causal, windowed) and recurrences;
    every (loop, layer) is counted. Norms, activations and rotary embedding are left out.
    """
    return head_flops(model) + _body_flops_per_token(model, seqlen)


def head_flops(model: LoopedTransformer) -> int:
    """The logits of one token."""
    return 2 * model.args.dim * model.args.vocab_size


def prefill_flops(model: LoopedTransformer, seqlen: int) -> int:
    """A prompt of `seqlen` tokens, of which the last one alone gets logits."""
    return seqlen * _body_flops_per_token(model, seqlen) + head_flops(model)


def _body_flops_per_token(model: LoopedTransformer, seqlen: int) -> int:
    flops = 0
    for loop in model.layout:
        for block, spec in zip(model.layers, loop, strict=True):
            assert isinstance(block, Block)
            flops += block.mixer(spec).flops_per_token(seqlen, spec.window)
            flops += 6 * block.feed_forward.dim * block.feed_forward.hidden_dim
    return flops


def train_flops_per_token(model: LoopedTransformer, seqlen: int) -> int:
    """Forward and backward: the backward of a product is two. Recomputation is not counted, so
    that utilisation says how fast the model trains, and not how busy the device is."""
    return 3 * forward_flops_per_token(model, seqlen)


def cache_bytes(model: LoopedTransformer, seqlen: int, dtype: torch.dtype) -> int:
    """Bytes that one decoded sequence of `seqlen` tokens holds, over all (loop, layer)."""
    return sum(
        block.mixer(spec).state_bytes(seqlen, dtype, spec.window)
        for loop in model.inference_layout
        for block, spec in zip(model.layers, loop, strict=True)
        if isinstance(block, Block)
    )


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
