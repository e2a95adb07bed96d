"""What a model costs: parameters, which loops share; FLOPs and bytes, which every loop pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from apps.LT2.block import Block
from apps.LT2.kernel.decode_linear import supports_rows
from apps.LT2.pattern import LayerSpec, Layout
from apps.LT2.transformer import LoopedTransformer

NOT_NORMED = ("wo", "w2")  # linears of a block whose inputs are not the output of a norm


@dataclass(frozen=True)
class ParameterCount:
    embedding: int  # input embedding, and the head if it is not tied
    gates: int  # rho and the exit gate
    body: int  # mixers, feed-forward, norms

    @property
    def total(self) -> int:
        return self.embedding + self.gates + self.body


def count_parameters(model: LoopedTransformer) -> ParameterCount:
    """Count each parameter once, in however many loops it runs."""

    def n(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    embedding = n(model.tok_embeddings)
    if not model.args.weight_tying:
        embedding += n(model.output)
    gates = model.rho.numel() if model.rho is not None else 0
    gates += n(model.exit_gate) if model.exit_gate is not None else 0
    return ParameterCount(embedding, gates, n(model) - embedding - gates)


def forward_flops_per_token(model: LoopedTransformer, seqlen: int) -> int:
    """Return the FLOPs of a forward pass per token of a sequence of `seqlen`.

    Counts multiplications and additions of matrix products, of attention over visible keys and of
    recurrences, in every (loop, layer). Norms, activations and rotary embedding don't count.
    """
    return head_flops(model) + _body_flops_per_token(model, seqlen, model.layout)


def exit_flops_per_token(
    model: LoopedTransformer, seqlen: int, shares: Sequence[float], *, kl: bool
) -> float:
    """Return the mean `forward_flops_per_token` of tokens that leave early, with the decisions.

    The share shares[t] leaves after loop t. A decision by KL runs the head after each loop, one by
    the exit gate a product with dim weights. What skipped loops add to caches doesn't count.
    """
    flops = 0.0
    for t, share in enumerate(shares):
        body = _body_flops_per_token(model, seqlen, model.inference_layout[: t + 1])
        n_gates = 0 if kl else min(t + 1, len(shares) - 1)
        heads = head_flops(model) * (t + 1 if kl else 1)
        flops += share * (body + heads + 2 * model.args.dim * n_gates)
    return flops


def head_flops(model: LoopedTransformer) -> int:
    """Return the FLOPs of the logits of one token."""
    return 2 * model.args.dim * model.args.vocab_size


def prefill_flops(model: LoopedTransformer, seqlen: int) -> int:
    """Return the FLOPs of a prompt of `seqlen` tokens, with logits of the last one only."""
    return seqlen * _body_flops_per_token(model, seqlen, model.layout) + head_flops(model)


def train_flops_per_token(model: LoopedTransformer, seqlen: int) -> int:
    """Return the FLOPs of forward and backward per token, the mean over the steps of a run."""
    return round(model.loop_plan.mean(lambda T: step_flops_per_token(model, seqlen, T)))


def step_flops_per_token(model: LoopedTransformer, seqlen: int, n_loops: int) -> int:
    """Return the FLOPs per token of a training step of `n_loops` loops.

    A backward has two products for each of the forward, in the loops that it goes through. With
    loop_loss the head and the exit gate run after each loop; the head of loops before the last on
    every loop_loss_every-th token. Recomputation doesn't count, so utilization measures the speed
    of training.
    """
    loops = model.inference_layout[:n_loops]
    forward = _body_flops_per_token(model, seqlen, loops)
    backward = _body_flops_per_token(model, seqlen, loops[-model.n_backward_loops(n_loops) :])
    n_losses = 1.0
    if model.args.loop_loss != "none":
        n_losses += (n_loops - 1) / model.args.loop_loss_every
    exits = 2 * model.args.dim * (n_loops - 1) if model.exit_gate is not None else 0
    return forward + 2 * backward + 3 * (round(n_losses * head_flops(model)) + exits)


def cache_bytes(model: LoopedTransformer, seqlen: int, dtype: torch.dtype) -> int:
    """Return the cache size of one decoded sequence of `seqlen` tokens, over all (loop, layer)."""
    return sum(
        block.mixer(spec).state_bytes(seqlen, dtype, spec.window)
        for block, spec in all_runs(model, model.inference_layout)
    )


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that a decode step moves."""

    weights: int  # the stack, once per loop
    head: int  # head, final norm and the tokens' rows of the embedding
    caches: int

    @property
    def total(self) -> int:
        return self.weights + self.head + self.caches


def step_traffic(
    model: LoopedTransformer, batch_size: int, seqlen: int, cache_dtype: torch.dtype
) -> StepTraffic:
    """Return the bytes of a step that extends `batch_size` sequences of `seqlen` tokens by one.

    Weights count in the dtypes that the step reads.
    """
    weights = 0 if model.rho is None else model.rho.nbytes
    per_sequence = 0
    for block, spec in all_runs(model, model.layout):
        mixer = block.mixer(spec)
        idle = sum(_nbytes(other, batch_size) for other in block.mixers() if other is not mixer)
        weights += _nbytes(block, batch_size) - idle
        per_sequence += mixer.step_bytes(seqlen, cache_dtype, spec.window)
    row = model.args.dim * model.tok_embeddings.weight.element_size()
    head = model.head_weight.nbytes + _nbytes(model.norm, batch_size) + batch_size * row
    return StepTraffic(weights, head, batch_size * per_sequence)


def _body_flops_per_token(model: LoopedTransformer, seqlen: int, layout: Layout) -> int:
    return sum(
        block.mixer(spec).flops_per_token(seqlen, spec.window)
        + 6 * block.feed_forward.dim * block.feed_forward.hidden_dim
        for block, spec in all_runs(model, layout)
    )


def all_runs(model: LoopedTransformer, layout: Layout) -> Iterator[tuple[Block, LayerSpec]]:
    for loop in layout:
        for block, spec in zip(model.layers, loop, strict=True):
            assert isinstance(block, Block)
            yield block, spec


def _nbytes(module: nn.Module, batch_size: int) -> int:
    """Count the bytes of the parameters, or of the 8-bit weights that a step reads instead."""
    n_bytes = sum(p.nbytes for p in module.parameters())
    for name, linear in module.named_modules():
        buffers = dict(linear.named_buffers(recurse=False))
        if "int8_weight" not in buffers:
            continue
        normed = name.rpartition(".")[2] not in NOT_NORMED
        if supports_rows(batch_size, buffers["int8_weight"].shape[1], normed=normed):
            n_bytes += buffers["int8_weight"].nbytes + buffers["int8_scale"].nbytes
            n_bytes -= buffers["fused_weight"].nbytes
    return n_bytes
