"""Cross-entropy of a linear head that never holds the logits of the whole batch.

The (N, V) logits of a 128k vocabulary are the largest tensors of a language model. Here they exist
for one chunk of tokens at a time. The chunk's gradients are computed at once: the gradient of a
mean loss is known up to the factor that backward brings. Loss and softmax are fp32.

With tensor parallelism each rank holds the logits of a part of the vocabulary, as in Megatron-LM
(https://arxiv.org/abs/1909.08053, section 3). Ranks exchange two numbers per token: the log-sum-exp
and the label's logit. The gradient of `hidden` is reduced once, for all chunks.

The states of several loops share head and targets. Their losses are summed here, so that there is
one gradient of the head, (V, D) in fp32, for all loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.linear_cross_entropy.naive import naive_linear_cross_entropy
from lingua.parallel.tensor_parallel import ALONE, TensorParallel

__all__ = ["linear_cross_entropy", "looped_linear_cross_entropy", "naive_linear_cross_entropy"]

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
    share_1N = hidden_ND.new_ones((), dtype=torch.float32).expand(1, hidden_ND.shape[0])
    return looped_linear_cross_entropy(
        [hidden_ND], weight_VD, target_N, share_1N, ignore_index, n_targets=n_targets, tp=tp
    )[0]


def looped_linear_cross_entropy(
    hidden_LND: Sequence[Tensor],
    weight_VD: Tensor,
    target_N: Tensor,
    share_LN: Tensor,
    ignore_index: int = -100,
    *,
    every: int = 1,
    offset: int = 0,
    n_targets: Tensor | None = None,
    tp: TensorParallel = ALONE,
) -> tuple[Tensor, Tensor]:
    """Return the mean over targets of sum_l share[l] * nats[l], and nats (L, N) in fp32.

    nats[l] = -log softmax(hidden[l] weight^T)[target], 0 for an ignored target, has no gradient.

    hidden  L tensors (N, D), such as the states of L loops     share (L, N) in fp32
    every   all l but the last only count tokens offset, offset + every, ..; elsewhere nats is 0
    Other arguments are as in `linear_cross_entropy`. hidden, weight and share get gradients.
    """
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad
        hidden_LND, weight_VD = [h.detach() for h in hidden_LND], weight_VD.detach()
    hidden_LND = [tp.copy_to(h) for h in hidden_LND]
    args = (weight_VD, target_N, ignore_index, n_targets, tp, every, offset, share_LN)
    return _LinearCrossEntropy.apply(*args, *hidden_LND)  # pyright: ignore


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in fp32, without rounding to half precision."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _fused_on_cuda(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function on CUDA: each pass over the logits takes as long as several layers."""

    @cache
    def compiled() -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=True)

    @wraps(function)
    def fused(logits_NV: Tensor, *args: Any) -> Tensor:
        if logits_NV.is_cuda and not torch.compiler.is_compiling():
            return compiled()(logits_NV, *args)
        return function(logits_NV, *args)

    return fused


@_fused_on_cuda
def _logsumexp(logits_NV: Tensor) -> Tensor:
    """Return the log-sum-exp of each row, (N, 1)."""
    return logits_NV.logsumexp(-1, keepdim=True)


@_fused_on_cuda
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


def _chunks(n_loops: int, n_tokens: int, every: int, offset: int) -> Iterator[tuple[int, slice]]:
    """Yield each loop with the tokens of each of its chunks."""
    for loop in range(n_loops):
        first, step = (offset, every) if loop < n_loops - 1 else (0, 1)
        for start in range(first, n_tokens, step * CHUNK_TOKENS):
            yield loop, slice(start, start + step * CHUNK_TOKENS, step)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        target: Tensor,
        ignore: int,
        n_targets: Tensor | None,
        tp: TensorParallel,
        every: int,
        offset: int,
        share: Tensor,
        *hidden: Tensor,
    ) -> tuple[Tensor, Tensor]:
        first_token = tp.rank * weight.shape[0]
        if n_targets is None:
            n_targets = (target != ignore).sum().clamp(min=1)
        wants_weight, *_, wants_share = ctx.needs_input_grad[:8]
        wants_hidden = ctx.needs_input_grad[8:]
        d_hidden = [
            torch.zeros_like(h) if wanted else None
            for h, wanted in zip(hidden, wants_hidden, strict=True)
        ]
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        nats = torch.zeros_like(share, memory_format=torch.contiguous_format)
        loss = share.new_zeros(())
        for loop, chunk in _chunks(len(hidden), len(target), every, offset):
            h, t, part = hidden[loop][chunk], target[chunk], share[loop, chunk]
            kept = t != ignore
            label = t.where(kept, 0)[:, None] - first_token
            logits = _matmul_fp32(h, weight.T)
            log_z, label_logit = _global_log_z_and_label_logit(logits, label, tp)
            nats[loop, chunk] = (log_z - label_logit)[:, 0].masked_fill(~kept, 0.0)
            loss += (nats[loop, chunk] * part).sum() / n_targets
            d_loop = d_hidden[loop]
            if d_loop is None and d_weight is None:
                continue
            factor = kept * part / n_targets
            d_logits = _logit_gradient(logits, log_z, label, factor, weight.dtype)
            if d_loop is not None:
                d_loop[chunk] = d_logits @ weight
            if d_weight is not None:
                d_weight += _matmul_fp32(d_logits.T, h)
        d_share = nats / n_targets if wants_share else None
        ctx.save_for_backward(d_weight, d_share, *d_hidden)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nats)
        ctx.set_materialize_grads(False)
        return loss, nats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        d_weight, d_share, *d_hidden = ctx.saved_tensors
        d_hidden = [d if d is None else (d * grad).to(d.dtype) for d in d_hidden]
        if d_weight is not None:
            d_weight = (d_weight * grad).to(ctx.weight_dtype)
        if d_share is not None:
            d_share = d_share * grad
        return d_weight, None, None, None, None, None, None, d_share, *d_hidden
