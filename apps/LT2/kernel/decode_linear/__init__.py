"""A product of few rows, with what a decode step does before and after it.

    y = f(norm(x) W^T) + residual        f: nothing, SwiGLU, or the short convolution of a token

On CUDA one kernel does it all, bound by reading W. Shapes: B rows, K inputs, N outputs (W has 2 N
rows for SwiGLU), C convolved outputs, S past inputs of the convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.decode_linear.triton import fits, launch
from apps.LT2.kernel.short_conv import short_conv_step

MAX_ROWS = 16
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


class Weight(NamedTuple):
    """A matrix. If 8-bit values are given, kernels read them, times `scale_N` (fp32), instead."""

    matrix_NK: Tensor
    int8_NK: Tensor | None = None
    scale_N: Tensor | None = None


class Norm(NamedTuple):
    weight_K: Tensor
    eps: float


class Conv(NamedTuple):
    """The convolution of the first C outputs, followed by SiLU; `state` is updated in place."""

    weight_CW: Tensor
    bias_C: Tensor | None
    state_BSC: Tensor


def decode_linear(
    x_BK: Tensor,
    weight: Weight,
    *,
    norm: Norm | None = None,
    swiglu: bool = False,
    conv: Conv | None = None,
    residual_BN: Tensor | None = None,
) -> Tensor:
    """Return (B, N) in x's dtype. Sums are fp32. Not differentiable.

    norm      RMSNorm of x before the product
    swiglu    the product has 2 N outputs; return silu(first half) * second half
    conv      convolve the first C outputs with their past inputs, and apply SiLU to them
    residual  (B, N) added at the end
    """
    assert not (swiglu and conv is not None), "either SwiGLU or a convolution"
    if kernel_supports(x_BK, weight) and supports_rows(*x_BK.shape, normed=norm is not None):
        matrix = weight.matrix_NK if weight.int8_NK is None else weight.int8_NK
        weight_K, eps = (None, 0.0) if norm is None else norm
        arguments = (x_BK, matrix, weight.scale_N, weight_K, eps, residual_BN)
        if conv is None:
            return decode_linear_triton(*arguments, swiglu)
        return decode_linear_conv_triton(*arguments, *conv)
    if norm is not None:
        wide = x_BK.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
        x_BK = (wide * scale * norm.weight_K.float()).type_as(x_BK)
    y_BN = F.linear(x_BK, weight.matrix_NK)
    if swiglu:
        gate, up = y_BN.chunk(2, dim=-1)
        y_BN = F.silu(gate) * up
    if conv is not None:
        streams, rest = y_BN.tensor_split([conv.weight_CW.shape[0]], dim=-1)
        streams = short_conv_step(streams, conv.weight_CW, conv.state_BSC, conv.bias_C)
        y_BN = torch.cat((streams, rest), dim=-1)
    return y_BN if residual_BN is None else residual_BN + y_BN


def kernel_supports(x_BK: Tensor, weight: Weight) -> bool:
    contiguous = x_BK.stride(-1) == 1 and weight.matrix_NK.is_contiguous()
    return x_BK.is_cuda and x_BK.dtype in KERNEL_DTYPES and contiguous


def supports_rows(B: int, K: int, *, normed: bool) -> bool:
    """Whether the kernel multiplies B rows of K inputs, which it normalizes first if `normed`.

    Otherwise torch multiplies them by the 16-bit matrix, also if there are 8-bit values.
    """
    return B <= MAX_ROWS and (not normed or fits(B, K))


@torch.library.custom_op("lt2::decode_linear", mutates_args=())
def decode_linear_triton(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    swiglu: bool,
) -> Tensor:
    """Run `decode_linear` with the Triton kernel, as an operator for torch.compile."""
    with torch.cuda.device_of(x):
        options = (x, weight, scale, norm, eps, residual, swiglu, None, None, None)
        return launch(*options, early=launches_early(x.device))


# A second operator: Inductor of torch 2.11 to 2.13 fails on a mutated argument that may be None.
@torch.library.custom_op("lt2::decode_linear_conv", mutates_args={"conv_state"})
def decode_linear_conv_triton(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
) -> Tensor:
    """The same with a convolution; mutates conv_state."""
    with torch.cuda.device_of(x):
        options = (x, weight, scale, norm, eps, residual, False)
        conv = (conv_weight, conv_bias, conv_state)
        return launch(*options, *conv, early=launches_early(x.device))


decode_linear_triton.register_fake(
    lambda x, weight, *options: x.new_empty(len(x), len(weight) // (2 if options[-1] else 1))
)
decode_linear_conv_triton.register_fake(lambda x, weight, *_: x.new_empty(len(x), len(weight)))


def launches_early(device: torch.device) -> bool:
    """Whether a kernel may start before the previous one ends: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
