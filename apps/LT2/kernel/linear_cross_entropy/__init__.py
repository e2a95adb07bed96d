"""Cross-entropy of a linear head without ever holding the logits of the whole batch.

The (N, V) logits of a 128k vocabulary are the largest tensors of a language model. Here they exist
for one chunk of tokens at a time; the chunk's gradients are taken at once, since the gradient of a
mean loss is known up to the factor that backward will bring. Loss and softmax are fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.linear_cross_entropy.naive import naive_linear_cross_entropy

__all__ = ["linear_cross_entropy", "naive_linear_cross_entropy"]

# 2048 tokens x 128k pieces are 1 GiB of fp32 logits, and matrix products of this height are fast.
CHUNK_TOKENS = 2048


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, ignore_index: int = -100
) -> Tensor:
    """Mean of -log softmax(hidden weight^T)[target] over the targets that are not `ignore_index`.

    hidden  (N, D)    weight (V, D), of one floating dtype     target (N,) int64
    Returns a scalar in fp32: zero, with zero gradients, where every target is ignored.
    """
    if not torch.is_grad_enabled():  # which a Function is not told: it sees parameters all the same
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, target_N, ignore_index)  # pyright: ignore


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result; half-precision inputs are not rounded on the way out."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, ignore: int) -> Tensor:
        n_targets = (target != ignore).sum().clamp(min=1)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            piece = slice(start, start + CHUNK_TOKENS)
            h, t = hidden[piece], target[piece]
            kept = t != ignore
            label = t.where(kept, 0)[:, None]
            logits = _matmul_fp32(h, weight.T)
            log_z = logits.logsumexp(-1, keepdim=True)
            losses = (log_z - logits.gather(1, label))[:, 0]
            loss += losses.masked_fill(~kept, 0.0).sum() / n_targets
            if not (wants_hidden or wants_weight):
                continue
            d_logits = logits.sub_(log_z).exp_()
            d_logits.scatter_add_(1, label, -torch.ones_like(log_z))
            d_logits.mul_((kept / n_targets)[:, None])
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[piece] = d_logits @ weight
            if d_weight is not None:
                d_weight += _matmul_fp32(d_logits.T, h)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_hidden * grad).to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None
