"""The convolution of all tokens on CUDA: one kernel forward, one backward.

Compiled plain torch moves eight times the bytes of x, dy and dx for the gradients: each weight has
its own product and recomputes the derivative of the SiLU. Here a program walks down the tokens of
some channels and keeps the last K inputs in registers, and in backward the K incomplete sums of dx.
Every number is read once. Weight gradients are summed over the tokens of a program and then over
programs, in a fixed order.

Shapes: B sequences, T tokens, C channels, K kernel size.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.triton_jit import jit, tl

ROWS = 64  # tokens per program
BLOCK = {"ROWS": ROWS, "BLOCK_C": 128, "num_warps": 1}  # four channels per thread
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernel_supports(x_BTC: Tensor) -> bool:
    """Return whether the kernels support x; they take no state."""
    return x_BTC.is_cuda and x_BTC.dtype in DTYPES


@torch.library.custom_op("lt2::short_conv", mutates_args=())
def short_conv_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, silu: bool
) -> Tensor:
    """Return y (B, T, C), contiguous and in x's dtype, for x (B, T, C) and weight (C, K).

    position  (T,)  int32 position of each token in its document, if documents are packed
    Differentiable in x, weight and bias (C,).
    """
    x = _contiguous_channels(x)
    B, T, C = x.shape
    y = x.new_empty(B, T, C)
    with torch.cuda.device_of(x):
        _conv_forward_kernel[_grid(B, T, C)](
            x,
            weight,
            bias,
            position,
            y,
            *(T, C, *x.stride()[:2], *weight.stride()),
            **_constants(weight, bias, position, silu),
        )
    return y


short_conv_fused.register_fake(lambda x, *_: x.new_empty(x.shape))


@torch.library.custom_op("lt2::short_conv_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias (empty without bias)."""
    x, dy = _contiguous_channels(x), _contiguous_channels(dy)
    B, T, C = x.shape
    K, grid = weight.shape[1], _grid(B, T, C)
    dx = x.new_empty(B, T, C)
    # A row per weight, and one for the bias.
    sums = x.new_empty(B, grid[0], K + 1, C, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _conv_backward_kernel[grid](
            x,
            weight,
            bias,
            position,
            dy,
            dx,
            sums,
            *(T, C, *x.stride()[:2], *weight.stride(), *dy.stride()[:2]),
            **_constants(weight, bias, position, silu),
        )
    total = sums.sum((0, 1))
    dweight = weight.new_empty(weight.shape).copy_(total[:K].T)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape).copy_(total[K])
    return dx, dweight, dbias


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, position = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy, x, weight, bias, position, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None, None


short_conv_fused.register_autograd(_differentiate, setup_context=_save)


def _contiguous_channels(x_BTC: Tensor) -> Tensor:
    return x_BTC if x_BTC.stride(-1) == 1 else x_BTC.contiguous()


def _grid(B: int, T: int, C: int) -> tuple[int, int, int]:
    return -(-T // ROWS), -(-C // BLOCK["BLOCK_C"]), B


def _constants(
    weight: Tensor, bias: Tensor | None, position: Tensor | None, silu: bool
) -> dict[str, Any]:
    options = {"K": weight.shape[1], "HAS_BIAS": bias is not None, "PACKED": position is not None}
    return {**options, "SILU": silu, **BLOCK}


# ---- kernels; a program has ROWS tokens and BLOCK_C channels of one sequence


@jit()
def _conv_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    y_ptr,
    T,
    C,
    x_B,
    x_T,
    weight_C,
    weight_K,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, first = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    at_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_C = at_C < C
    x_ptr += b * x_B
    y_ptr += b * T * C
    weights, bias = _weights(
        weight_ptr, bias_ptr, at_C, in_C, weight_C, weight_K, K, HAS_BIAS, BLOCK_C
    )
    past = _inputs_before(x_ptr, first, T, x_T, at_C, in_C, K)
    x = _row(x_ptr, first, T, x_T, at_C, in_C)
    for r in range(ROWS):
        t = first + r
        past = past[1:] + (x,)
        x = _row(x_ptr, t + 1, T, x_T, at_C, in_C)  # prefetch the next token
        y = _convolve(past, weights, bias, _position(position_ptr, t, T, PACKED), K, PACKED)
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(y_ptr + t * C + at_C, y.to(y_ptr.dtype.element_ty), mask=in_C & (t < T))


@jit()
def _conv_backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    dy_ptr,
    dx_ptr,
    sums_ptr,
    T,
    C,
    x_B,
    x_T,
    weight_C,
    weight_K,
    dy_B,
    dy_T,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, first = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    at_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_C = at_C < C
    x_ptr += b * x_B
    dy_ptr += b * dy_B
    dx_ptr += b * T * C
    weights, bias = _weights(
        weight_ptr, bias_ptr, at_C, in_C, weight_C, weight_K, K, HAS_BIAS, BLOCK_C
    )
    past = _inputs_before(x_ptr, first, T, x_T, at_C, in_C, K)
    zero = tl.zeros([BLOCK_C], tl.float32)
    dweights, dbias = (zero,) * K, zero
    dx = (zero,) * K  # of the last K tokens; later tokens still add to them
    x = _row(x_ptr, first, T, x_T, at_C, in_C)
    dy = _row(dy_ptr, first, T, dy_T, at_C, in_C)
    for r in range(ROWS + K - 1):  # the last K - 1 belong to the next program and only complete dx
        t = first + r
        past = past[1:] + (x,)
        d = dy
        x = _row(x_ptr, t + 1, T, x_T, at_C, in_C)  # prefetch the next token
        dy = _row(dy_ptr, t + 1, T, dy_T, at_C, in_C)
        position = _position(position_ptr, t, T, PACKED)
        if SILU:
            y = _convolve(past, weights, bias, position, K, PACKED)
            s = tl.sigmoid(y)
            d *= s * (1 + y * (1 - s))
        own = tl.where(r < ROWS, d, 0.0)
        dbias += own
        new_dx, new_dweights = (), ()
        for j in tl.static_range(K):
            read = 1.0
            if PACKED:
                read = tl.where(position >= K - 1 - j, 1.0, 0.0)
            new_dweights = new_dweights + (dweights[j] + own * (read * past[j]),)
            new_dx = new_dx + (dx[j] + d * (read * weights[j]),)
        dweights = new_dweights
        done = t - (K - 1)
        to = dx_ptr + done * C + at_C
        mask = in_C & (r >= K - 1) & (done < T)
        tl.store(to, new_dx[0].to(dx_ptr.dtype.element_ty), mask=mask)
        dx = new_dx[1:] + (zero,)
    sums_ptr += (b * tl.num_programs(0) + tl.program_id(0)) * (K + 1) * C + at_C
    for j in tl.static_range(K):
        tl.store(sums_ptr + j * C, dweights[j], mask=in_C)
    tl.store(sums_ptr + K * C, dbias, mask=in_C)


@jit()
def _convolve(past, weights, bias, position, K: tl.constexpr, PACKED: tl.constexpr):
    """Return the fp32 sum before the SiLU for a token at `position` in its document."""
    y = bias
    for j in tl.static_range(K):
        x = past[j]
        if PACKED:
            x = tl.where(position >= K - 1 - j, x, 0.0)
        y += x * weights[j]
    return y


@jit()
def _inputs_before(x_ptr, first, T, x_T, at_C, in_C, K: tl.constexpr):
    """Load the K inputs before token `first`, oldest first; zeros before the sequence."""
    past = ()
    for j in tl.static_range(K):
        past = past + (_row(x_ptr, first - K + j, T, x_T, at_C, in_C),)
    return past


@jit()
def _row(ptr, t, T, stride, at_C, in_C):
    at = ptr + t * stride + at_C
    return tl.load(at, mask=in_C & (t >= 0) & (t < T), other=0.0).to(tl.float32)


@jit()
def _position(position_ptr, t, T, PACKED: tl.constexpr):
    position = t
    if PACKED:
        position = tl.load(position_ptr + t, mask=t < T, other=0)
    return position


@jit()
def _weights(
    weight_ptr,
    bias_ptr,
    at_C,
    in_C,
    weight_C,
    weight_K,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Load the K weights, and the bias or zeros."""
    weights = ()
    for j in tl.static_range(K):
        at = weight_ptr + at_C * weight_C + j * weight_K
        weights = weights + (tl.load(at, mask=in_C, other=0.0).to(tl.float32),)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + at_C, mask=in_C, other=0.0).to(tl.float32)
    return weights, bias
