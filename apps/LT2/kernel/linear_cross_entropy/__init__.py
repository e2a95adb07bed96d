"""Cross-entropy of a linear head that never holds the logits of the whole batch.

The (N, V) logits of a 128k vocabulary are the largest tensors of a language model. Here they exist
for one chunk of tokens at a time. The chunk's gradients are computed at once: the gradient of a
mean loss is known up to the factor that backward brings. Loss and softmax are fp32.

With tensor parallelism each rank holds the logits of a part of the vocabulary, as in Megatron-LM
(https://arxiv.org/abs/1909.08053, section 3). Ranks exchange two numbers per token: the log-sum-exp
and the label's logit. The gradient of `hidden` is reduced once, for all chunks.

Tokens may have weights, so the losses of several loops are one call: chunks are full, and there is
one gradient of the head, (V, D) in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.fused import fused_on_cuda
from apps.LT2.kernel.linear_cross_entropy.naive import naive_linear_cross_entropy
from lingua.parallel.tensor_parallel import ALONE, TensorParallel

__all__ = ["linear_cross_entropy", "naive_linear_cross_entropy", "weighted_linear_cross_entropy"]

# 2048 tokens x 128k logits are 1 GiB in fp32, and matrix products of this height are fast.
CHUNK_TOKENS = 2048


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    ignore_index: int = -100,
    *,
    n_targets: Tensor | None = None,
    tp: TensorParallel = ALONE,
) -> Tensor:
    """Return the mean of -log softmax(hidden weight^T)[target] over targets != `ignore_index`.

    hidden     (N, D)    weight (V, D), of one floating dtype     target (N,) int64
    n_targets  (), fp32: divides the sum, instead of the number of targets
    tp         ranks with the same hidden and target; weight holds this rank's V rows
    Returns an fp32 scalar: zero, with zero gradients, if every target is ignored.
    """
    share_N = hidden_ND.new_ones((), dtype=torch.float32).expand(len(target_N))
    return weighted_linear_cross_entropy(
        hidden_ND, weight_VD, target_N, share_N, ignore_index, n_targets=n_targets, tp=tp
    )[0]


def weighted_linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    share_N: Tensor,
    ignore_index: int = -100,
    *,
    n_targets: Tensor | None = None,
    tp: TensorParallel = ALONE,
) -> tuple[Tensor, Tensor]:
    """Return the mean over targets of share * nats, and nats (N,) in fp32.

    nats = -log softmax(hidden weight^T)[target], 0 for an ignored target, has no gradient.

    share   (N,) in fp32: the weight of each token
    Other arguments are as in `linear_cross_entropy`. hidden, weight and share get gradients.
    """
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    args = (tp.copy_to(hidden_ND), weight_VD, share_N, target_N, ignore_index, n_targets, tp)
    return _LinearCrossEntropy.apply(*args)  # pyright: ignore


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in fp32, without rounding to half precision."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total` in fp32, in place.

    The product accumulates: a separate sum would read the product and `total` once more.
    """
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), out=total)


# Each pass over the logits takes as long as several layers, so they are fused.
@fused_on_cuda(1)
def _logsumexp(logits_NV: Tensor) -> Tensor:
    """Return the log-sum-exp of each row, (N, 1)."""
    return logits_NV.logsumexp(-1, keepdim=True)


@fused_on_cuda(4)
def _logit_gradient(
    logits_NV: Tensor, log_z_N1: Tensor, label_N1: Tensor, weight_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return (softmax(logits) - onehot(label)) * weight in `dtype`, computed in fp32."""
    token_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    gradient = (logits_NV - log_z_N1).exp() - (token_V == label_N1).float()
    return (gradient * weight_N[:, None]).to(dtype)


def _global_log_z_and_label_logit(
    logits_NV: Tensor, label_N1: Tensor, tp: TensorParallel
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp over all ranks' logits and the label's logit, both (N, 1).

    label: its column here; outside 0 .. V-1 if another rank has it.
    """
    log_z_N1 = _logsumexp(logits_NV)
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
        share: Tensor,
        target: Tensor,
        ignore: int,
        n_targets: Tensor | None,
        tp: TensorParallel,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight, wants_share, *_ = ctx.needs_input_grad
        kept = target != ignore
        if n_targets is None:
            n_targets = kept.sum().clamp(min=1)
        label = target.where(kept, 0)[:, None] - tp.rank * weight.shape[0]
        factor = kept * share / n_targets
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        nats = torch.empty_like(factor)
        for start in range(0, len(target), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            logits = _matmul_fp32(hidden[chunk], weight.T)
            log_z, label_logit = _global_log_z_and_label_logit(logits, label[chunk], tp)
            nats[chunk] = (log_z - label_logit)[:, 0]
            if d_hidden is None and d_weight is None:
                continue
            d_logits = _logit_gradient(logits, log_z, label[chunk], factor[chunk], weight.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                _add_product(d_weight, d_logits.T, hidden[chunk])
        nats.masked_fill_(~kept, 0.0)
        d_share = nats / n_targets if wants_share else None
        ctx.save_for_backward(d_hidden, d_weight, d_share)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nats)
        ctx.set_materialize_grads(False)
        return (nats * factor).sum(), nats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        d_hidden, d_weight, d_share = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_hidden * grad).to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grad).to(ctx.weight_dtype)
        if d_share is not None:
            d_share = d_share * grad
        return d_hidden, d_weight, d_share, None, None, None, None
