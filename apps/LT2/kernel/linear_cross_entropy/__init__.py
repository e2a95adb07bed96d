"""Cross-entropy of a linear head without ever holding the logits of the whole batch.

The (N, V) logits of a 128k vocabulary are the largest tensors of a language model. Here they exist
for one chunk of tokens at a time; the chunk's gradients are taken at once, since the gradient of a
mean loss is known up to the factor that backward will bring. Loss and softmax are fp32.

Ranks of tensor parallelism each have the logits of their own pieces, as in Megatron-LM
(https://arxiv.org/abs/1909.08053, section 3). For a chunk they share two numbers a token, their
log-sum-exp and the label's logit; the gradient of `hidden` is summed once, for all chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.linear_cross_entropy.naive import naive_linear_cross_entropy
from lingua.parallel.tensor_parallel import ALONE, TensorParallel

__all__ = ["linear_cross_entropy", "naive_linear_cross_entropy"]

# 2048 tokens x 128k pieces are 1 GiB of fp32 logits, and matrix products of this height are fast.
CHUNK_TOKENS = 2048


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    ignore_index: int = -100,
    *,
    tp: TensorParallel = ALONE,
) -> Tensor:
    """Mean of -log softmax(hidden weight^T)[target] over the targets that are not `ignore_index`.

    hidden  (N, D)    weight (V, D), of one floating dtype     target (N,) int64
    Over the ranks of `tp` hidden and target are the same, and weight is this rank's rows, of V on
    each. Returns a scalar in fp32: zero, with zero gradients, where every target is ignored.
    """
    if not torch.is_grad_enabled():  # which a Function is not told: it sees parameters all the same
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    args = (tp.copy_to(hidden_ND), weight_VD, target_N, ignore_index, tp)
    return _LinearCrossEntropy.apply(*args)  # pyright: ignore


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result; half-precision inputs are not rounded on the way out."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _log_normalizer(logits_NV: Tensor) -> Tensor:
    """(N, 1) log-sum-exp of each row."""
    return _on_cuda_fused(_logsumexp, logits_NV)


def _logit_gradient(
    logits_NV: Tensor, log_z_N1: Tensor, label_N1: Tensor, weight_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """(softmax(logits) - onehot(label)) * weight, computed in fp32 and returned in `dtype`."""
    return _on_cuda_fused(_softmax_minus_onehot, logits_NV, log_z_N1, label_N1, weight_N, dtype)


def _logsumexp(logits_NV: Tensor) -> Tensor:
    return logits_NV.logsumexp(-1, keepdim=True)


def _softmax_minus_onehot(
    logits_NV: Tensor, log_z_N1: Tensor, label_N1: Tensor, weight_N: Tensor, dtype: torch.dtype
) -> Tensor:
    piece_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    gradient = (logits_NV - log_z_N1).exp() - (piece_V == label_N1).float()
    return (gradient * weight_N[:, None]).to(dtype)


def _on_cuda_fused(function: Callable[..., Tensor], logits: Tensor, *args: Any) -> Tensor:
    """On CUDA each pass over the logits costs as much as several layers: compiled, each of these
    functions is one."""
    if logits.is_cuda and not torch.compiler.is_compiling():
        return _compiled(function)(logits, *args)
    return function(logits, *args)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True)


def _joint_log_z_and_label_logit(
    logits_NV: Tensor, label_N1: Tensor, tp: TensorParallel
) -> tuple[Tensor, Tensor]:
    """(N, 1) log-sum-exp over all ranks' logits, and the label's logit.

    label: its column here, outside of 0 .. V-1 where another rank has it.
    """
    log_z_N1 = _log_normalizer(logits_NV)
    if tp.size == 1:
        return log_z_N1, logits_NV.gather(1, label_N1)
    is_own = (label_N1 >= 0) & (label_N1 < logits_NV.shape[1])
    label_logit_N1 = logits_NV.gather(1, label_N1.where(is_own, 0)).where(is_own, 0.0)
    joint_N2R = tp.gather_from(torch.stack((log_z_N1, label_logit_N1), dim=1))
    return joint_N2R[:, 0].logsumexp(-1, keepdim=True), joint_N2R[:, 1].sum(-1, keepdim=True)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        ignore: int,
        tp: TensorParallel,
    ) -> Tensor:
        first_piece = tp.rank * weight.shape[0]
        n_targets = (target != ignore).sum().clamp(min=1)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            piece = slice(start, start + CHUNK_TOKENS)
            h, t = hidden[piece], target[piece]
            kept = t != ignore
            label = t.where(kept, 0)[:, None] - first_piece
            logits = _matmul_fp32(h, weight.T)
            log_z, label_logit = _joint_log_z_and_label_logit(logits, label, tp)
            losses = (log_z - label_logit)[:, 0]
            loss += losses.masked_fill(~kept, 0.0).sum() / n_targets
            if not (wants_hidden or wants_weight):
                continue
            d_logits = _logit_gradient(logits, log_z, label, kept / n_targets, weight.dtype)
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
        return d_hidden, d_weight, None, None, None
