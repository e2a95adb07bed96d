"""The convolution of one token on CUDA; the same kernel shifts the state.

Plain torch takes three kernels of 1-2 us each, in every layer and loop of a step. Shapes as in
`short_conv_step`.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.triton_jit import jit, tl, triton

BLOCK_C = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernel_supports(x_BC: Tensor, state_BKC: Tensor) -> bool:
    fits = x_BC.stride(-1) == 1 and state_BKC.is_contiguous()
    return x_BC.is_cuda and x_BC.dtype in DTYPES and fits


@torch.library.custom_op("lt2::short_conv_step", mutates_args={"state"})
def short_conv_step_triton(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    """Run `short_conv_step` with the Triton kernel; mutates state."""
    assert kernel_supports(x, state), "channels must be contiguous and on CUDA"
    B, C = x.shape
    y = x.new_empty(B, C)
    with torch.cuda.device_of(x):
        _step_kernel[(B, triton.cdiv(C, BLOCK_C))](
            x,
            weight,
            bias,
            state,
            y,
            C,
            x.stride(0),
            *weight.stride(),
            KEPT=state.shape[1],
            BLOCK_C=BLOCK_C,
            HAS_BIAS=bias is not None,
            SILU=silu,
        )
    return y


short_conv_step_triton.register_fake(lambda x, *_: x.new_empty(x.shape))


@jit()
def _step_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    y_ptr,
    C,
    x_B,
    weight_C,
    weight_K,
    KEPT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    at_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = at_C < C
    weight_at = weight_ptr + at_C * weight_C
    x = tl.load(x_ptr + b * x_B + at_C, mask=inside, other=0.0)
    y = x.to(tl.float32) * tl.load(weight_at + KEPT * weight_K, mask=inside, other=0.0).to(
        tl.float32
    )
    for j in tl.static_range(KEPT):
        slot = state_ptr + (b * KEPT + j) * C + at_C
        past = tl.load(slot, mask=inside, other=0.0).to(tl.float32)
        y += past * tl.load(weight_at + j * weight_K, mask=inside, other=0.0).to(tl.float32)
        if j > 0:  # shift the state
            tl.store(slot - C, past.to(state_ptr.dtype.element_ty), mask=inside)
    tl.store(
        state_ptr + (b * KEPT + KEPT - 1) * C + at_C, x.to(state_ptr.dtype.element_ty), mask=inside
    )
    if HAS_BIAS:
        y += tl.load(bias_ptr + at_C, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = y / (1 + tl.exp(-y))
    tl.store(y_ptr + b * C + at_C, y.to(y_ptr.dtype.element_ty), mask=inside)
