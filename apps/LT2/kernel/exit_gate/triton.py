"""The exit gate's decision on CUDA. Plain torch takes some fifteen kernels of 1-2 us each.

A program takes one token. Shapes as in `exit_by_gate`.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.triton_jit import jit, tl, triton


def launch(
    h_ND: Tensor,
    left_N: Tensor,
    stay_N: Tensor | None,
    norm_D: Tensor,
    eps: float,
    weight_D: Tensor,
    bias_1: Tensor,
    limit: float,
    held_ND: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    N, D = h_ND.shape
    h_ND = h_ND.contiguous()
    new_left_N, new_stay_N = torch.empty_like(left_N), h_ND.new_empty(N, dtype=torch.float32)
    new_h_ND = h_ND
    if held_ND is not None:
        held_ND, new_h_ND = held_ND.contiguous(), torch.empty_like(h_ND)
    _gate_kernel[(N,)](
        h_ND,
        held_ND,
        left_N,
        stay_N,
        norm_D,
        weight_D,
        bias_1,
        new_h_ND,
        new_left_N,
        new_stay_N,
        D,
        eps,
        limit,
        BLOCK_D=triton.next_power_of_2(D),
    )
    return new_h_ND, new_left_N, new_stay_N


@jit()
def _gate_kernel(
    h_ptr,
    held_ptr,
    left_ptr,
    stay_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    new_h_ptr,
    new_left_ptr,
    new_stay_ptr,
    D,
    eps,
    limit,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_D)
    inside = at < D
    left = tl.load(left_ptr + n) != 0
    h = tl.load(h_ptr + n * D + at, mask=inside, other=0.0)
    if held_ptr is not None:
        held = tl.load(held_ptr + n * D + at, mask=inside, other=0.0)
        h = tl.where(left, held, h)
        tl.store(new_h_ptr + n * D + at, h, mask=inside)
    x = h.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    x *= tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = x.to(h.dtype).to(tl.float32)  # rounded as the norm rounds
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    logit = tl.sum(x * weight, axis=0) + tl.load(bias_ptr).to(tl.float32)
    stay = tl.minimum(-logit, 0.0) - tl.log(1 + tl.exp(-tl.abs(logit)))
    if stay_ptr is not None:
        stay += tl.load(stay_ptr + n)
    tl.store(new_stay_ptr + n, stay)
    tl.store(new_left_ptr + n, left | (stay <= limit))
