"""The convolution of all tokens on CUDA: one kernel forward, one backward.

Compiled plain torch moves eight times the bytes of x, dy and dx for the gradients: each weight has
its own product and recomputes the derivative of the SiLU. Here a program walks down the tokens of
some channels and keeps the last K inputs in registers, and in backward the K incomplete sums of dx.
Every number is read once, AHEAD tokens before it is used, so that reads overlap with sums, and the
sums of AHEAD tokens with each other. Weight gradients are summed over the tokens of a program and
then over programs, in a fixed order.

The delta rules take q and k by head, divided by their norms, and v. A program of `conv_unit_heads`
has one head of q or k, so it normalizes what it computed, and writes each result where the
recurrence reads it.

Shapes: B sequences, T tokens, C channels, K kernel size.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.short_conv.heads import EPS
from apps.LT2.kernel.triton_jit import jit, tl

ROWS = 64  # tokens per program
AHEAD = 4  # tokens read ahead; with 8, registers allow half as many programs in backward
BLOCK = {"ROWS": ROWS, "AHEAD": AHEAD, "BLOCK_C": 128, "num_warps": 1}  # four channels per thread
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_KEY_DIM = 256  # eight channels per thread


def kernel_supports(x_BTC: Tensor) -> bool:
    """Return whether the kernels support x; they take no state."""
    return x_BTC.is_cuda and x_BTC.dtype in DTYPES


# ---- the convolution


@torch.library.custom_op("lt2::short_conv", mutates_args=())
def short_conv_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, silu: bool
) -> Tensor:
    """Return y (B, T, C), contiguous and in x's dtype, for x (B, T, C) and weight (C, K).

    position  (T,)  int32 position of each token in its document, if documents are packed
    Differentiable in x, weight and bias (C,).
    """
    y = x.new_empty(x.shape)
    _convolve_forward(x, weight, bias, position, silu, y)
    return y


short_conv_fused.register_fake(lambda x, *_: x.new_empty(x.shape))


@torch.library.custom_op("lt2::short_conv_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias (empty without bias)."""
    dx = x.new_empty(x.shape)
    total = _convolve_backward(_contiguous_channels(dy), x, weight, bias, position, silu, dx)
    dweight = weight.new_empty(weight.shape).copy_(total[:-1].T)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape).copy_(total[-1])
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


# ---- the convolution, heads and norms of the delta rules


def heads_supported(x_BTC: Tensor, key_dim: int) -> bool:
    """Return whether the kernels of `conv_unit_heads` support x and the key dim."""
    return kernel_supports(x_BTC) and key_dim <= MAX_KEY_DIM


@torch.library.custom_op("lt2::conv_unit_heads", mutates_args=())
def conv_unit_heads(
    x: Tensor, weight: Tensor, position: Tensor | None, n_heads: int, key_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k (B, T, n_heads, key_dim) of unit norm, and v (B, T, n_heads, V), contiguous.

    x holds the channels of q, k and v in order. Other arguments are as in `short_conv_fused`.
    Differentiable in x and weight.
    """
    q, k, v = _empty_heads(x, n_heads, key_dim)
    keys = n_heads * key_dim
    _convolve_forward(x[..., : 2 * keys], weight[: 2 * keys], None, position, True, q, k)
    _convolve_forward(x[..., 2 * keys :], weight[2 * keys :], None, position, True, v)
    return q, k, v


@conv_unit_heads.register_fake
def _empty_heads(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    n_heads, key_dim = args[-2:]
    value_dim = x.shape[2] // n_heads - 2 * key_dim
    q, k, v = (x.new_empty(*x.shape[:2], n_heads, d) for d in (key_dim, key_dim, value_dim))
    return q, k, v


@torch.library.custom_op("lt2::conv_unit_heads_backward", mutates_args=())
def _heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, weight: Tensor, position: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    keys = dq.shape[2] * dq.shape[3]
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    for at, grads in (slice(2 * keys), (dq, dk)), (slice(2 * keys, None), (dv,)):
        total = _convolve_backward(
            grads[0], x[..., at], weight[at], None, position, True, dx[..., at], *grads[1:]
        )
        dweight[at].copy_(total[:-1].T)
    return dx, dweight


@_heads_backward.register_fake
def _(
    dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_heads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate_heads(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return *_heads_backward(*grads, *ctx.saved_tensors), None, None, None


conv_unit_heads.register_autograd(_differentiate_heads, setup_context=_save_heads)


# ---- launches


def _convolve_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    silu: bool,
    y: Tensor,
    k: Tensor | None = None,
) -> None:
    """Write the convolution of x (B, T, C) to the contiguous y.

    With `k`, x holds q and k: y and k (B, T, H, D) are the heads of unit norm.
    """
    x = _contiguous_channels(x)
    B, T, C = x.shape
    grid, constants = _layout(x, weight, bias, position, silu, k)
    with torch.cuda.device_of(x):
        _conv_forward_kernel[grid](
            *(x, weight, bias, position, y, k),
            *(T, C, *x.stride()[:2], *weight.stride()),
            **constants,
        )


def _convolve_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    silu: bool,
    dx: Tensor,
    dk: Tensor | None = None,
) -> Tensor:
    """Write dx, which may be channels of a larger tensor. dy and dk are as y and k in forward.

    Return the gradients of the weights and the bias, (K + 1, C) in fp32.
    """
    x = _contiguous_channels(x)
    B, T, C = x.shape
    grid, constants = _layout(x, weight, bias, position, silu, dk)
    # A row per weight, and one for the bias.
    sums = x.new_empty(B, grid[0], weight.shape[1] + 1, C, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _conv_backward_kernel[grid](
            *(x, weight, bias, position, dy, dk, dx, sums),
            *(T, C, *x.stride()[:2], *weight.stride(), *dy.stride()[:2], *dx.stride()[:2]),
            **constants,
        )
    return sums.sum((0, 1))


def _contiguous_channels(x_BTC: Tensor) -> Tensor:
    return x_BTC if x_BTC.stride(-1) == 1 else x_BTC.contiguous()


def _layout(
    x_BTC: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    silu: bool,
    k: Tensor | None,
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the grid and the constants of a launch."""
    B, T, C = x_BTC.shape
    options = {"K": weight.shape[1], "HAS_BIAS": bias is not None, "PACKED": position is not None}
    options = {**options, "SILU": silu, **BLOCK, "HEADS": 0, "KEY_DIM": 0, "EPS": EPS}
    options["DIVISOR"] = gcd(x_BTC.stride(1), 8)
    if k is not None:
        H, dim = k.shape[2:]
        block = max(1 << (dim - 1).bit_length(), 32)
        options.update(HEADS=H, KEY_DIM=dim, BLOCK_C=block)
        return (-(-T // ROWS), 2 * H, B), options
    return (-(-T // ROWS), -(-C // options["BLOCK_C"]), B), options


# ---- kernels; a program has ROWS tokens and BLOCK_C channels of one sequence
#
# With HEADS, its channels are a head of q or k: head HEADS + h is head h of k.


@jit()
def _conv_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    y_ptr,
    k_ptr,
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
    AHEAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    EPS: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    x_T = x_T // DIVISOR * DIVISOR  # else rows are read by channel, unless 16 divides the stride
    b, first = tl.program_id(2).to(tl.int64), tl.program_id(0) * ROWS
    at_C, in_C, at_head, second = _channels(C, HEADS, KEY_DIM, BLOCK_C)
    y_T = C
    if HEADS:
        y_ptr = tl.where(second, k_ptr, y_ptr)
        y_T = HEADS * KEY_DIM
    x_at = x_ptr + b * x_B + first.to(tl.int64) * x_T + at_C
    y_at = y_ptr + (b * T + first) * y_T + at_head
    weights, bias = _weights(
        weight_ptr, bias_ptr, at_C, in_C, weight_C, weight_K, K, HAS_BIAS, BLOCK_C
    )
    past = _inputs_before(x_at, first, x_T, in_C, K)
    left = tl.minimum(T - first, ROWS)  # rows to do
    x, positions = (), ()
    for i in tl.static_range(AHEAD):
        x += (_row(x_at + i * x_T, in_C & (i < left)),)
        positions += (_position(position_ptr, first + i, i < left, PACKED),)
    for _ in range(0, ROWS, AHEAD):
        next_x, next_positions = (), ()
        for i in tl.static_range(AHEAD):
            ahead = AHEAD + i
            past = past[1:] + (x[i].to(tl.float32),)
            next_x += (_row(x_at + ahead * x_T, in_C & (ahead < left)),)
            next_positions += (_position(position_ptr, first + ahead, ahead < left, PACKED),)
            y = _convolve(_of_document(past, positions[i], K, PACKED), weights, bias, K)
            if SILU:
                y *= tl.sigmoid(y)
            if HEADS:
                y *= tl.rsqrt(tl.sum(y * y, 0) + EPS)
            tl.store(y_at + i * y_T, y.to(y_ptr.dtype.element_ty), mask=in_C & (i < left))
        x, positions = next_x, next_positions
        x_at += AHEAD * x_T
        y_at += AHEAD * y_T
        first += AHEAD
        left -= AHEAD


@jit()
def _conv_backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    dy_ptr,
    dk_ptr,
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
    dx_B,
    dx_T,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    EPS: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    x_T = x_T // DIVISOR * DIVISOR  # else rows are read by channel, unless 16 divides the stride
    b, first = tl.program_id(2).to(tl.int64), tl.program_id(0) * ROWS
    at_C, in_C, at_head, second = _channels(C, HEADS, KEY_DIM, BLOCK_C)
    if HEADS:
        dy_ptr = tl.where(second, dk_ptr, dy_ptr)
    x_at = x_ptr + b * x_B + first.to(tl.int64) * x_T + at_C
    dy_at = dy_ptr + b * dy_B + first.to(tl.int64) * dy_T + at_head
    dx_at = dx_ptr + b * dx_B + (first.to(tl.int64) - (K - 1)) * dx_T + at_C
    weights, bias = _weights(
        weight_ptr, bias_ptr, at_C, in_C, weight_C, weight_K, K, HAS_BIAS, BLOCK_C
    )
    past = _inputs_before(x_at, first, x_T, in_C, K)
    zero = tl.zeros([BLOCK_C], tl.float32)
    dweights, dbias = (zero,) * K, zero
    dx = (zero,) * K  # of the last K tokens; later tokens still add to them
    own_rows = tl.minimum(T - first, ROWS)
    # The last K - 1 rows belong to the next program and only complete dx.
    left = tl.minimum(T - first, ROWS + K - 1)
    x, dy, positions = (), (), ()
    for i in tl.static_range(AHEAD):
        x += (_row(x_at + i * x_T, in_C & (i < left)),)
        dy += (_row(dy_at + i * dy_T, in_C & (i < left)),)
        positions += (_position(position_ptr, first + i, i < left, PACKED),)
    for r in range(0, ROWS + K - 1, AHEAD):
        next_x, next_dy, next_positions = (), (), ()
        for i in tl.static_range(AHEAD):
            ahead = AHEAD + i
            past = past[1:] + (x[i].to(tl.float32),)
            d = dy[i].to(tl.float32)
            next_x += (_row(x_at + ahead * x_T, in_C & (ahead < left)),)
            next_dy += (_row(dy_at + ahead * dy_T, in_C & (ahead < left)),)
            next_positions += (_position(position_ptr, first + ahead, ahead < left, PACKED),)
            inputs = _of_document(past, positions[i], K, PACKED)
            if SILU:
                y = _convolve(inputs, weights, bias, K)
                s = tl.sigmoid(y)
                if HEADS:
                    z = y * s
                    scale = tl.rsqrt(tl.sum(z * z, 0) + EPS)
                    z *= scale
                    d = scale * (d - z * tl.sum(d * z, 0))
                d *= s * (1 + y * (1 - s))
            own = tl.where(r + i < ROWS, d, 0.0)
            if HAS_BIAS:
                dbias += own
            ds = _of_document((d,) * K, positions[i], K, PACKED)
            new_dx, new_dweights = (), ()
            for j in tl.static_range(K):
                new_dweights += (dweights[j] + own * inputs[j],)
                new_dx += (dx[j] + ds[j] * weights[j],)
            dweights = new_dweights
            done = r + i - (K - 1)
            mask = in_C & (done >= 0) & (done < own_rows)
            tl.store(dx_at + i * dx_T, new_dx[0].to(dx_ptr.dtype.element_ty), mask=mask)
            dx = new_dx[1:] + (zero,)
        x, dy, positions = next_x, next_dy, next_positions
        x_at += AHEAD * x_T
        dy_at += AHEAD * dy_T
        dx_at += AHEAD * dx_T
        first += AHEAD
        left -= AHEAD
    sums_ptr += (b * tl.num_programs(0) + tl.program_id(0)) * (K + 1) * C + at_C
    for j in tl.static_range(K):
        tl.store(sums_ptr + j * C, dweights[j], mask=in_C)
    tl.store(sums_ptr + K * C, dbias, mask=in_C)


@jit()
def _channels(C, HEADS: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a program's channels, their mask, where they are in q or k, and whether in k."""
    block = tl.program_id(1)
    at = tl.arange(0, BLOCK_C)
    if HEADS:
        second = block >= HEADS
        at_head = tl.where(second, block - HEADS, block) * KEY_DIM + at
        return block * KEY_DIM + at, at < KEY_DIM, at_head, second
    else:
        at_C = block * BLOCK_C + at
        return at_C, at_C < C, at_C, False


@jit()
def _convolve(inputs, weights, bias, K: tl.constexpr):
    """Return the fp32 sum before the SiLU."""
    y = bias
    for j in tl.static_range(K):
        y += inputs[j] * weights[j]
    return y


@jit()
def _of_document(values, position, K: tl.constexpr, PACKED: tl.constexpr):
    """Return K values, one per input of a token; zeros for inputs before its document."""
    if PACKED:
        kept = ()
        for j in tl.static_range(K - 1):
            kept += (tl.where(position >= K - 1 - j, values[j], 0.0),)
        values = kept + (values[K - 1],)
    return values


@jit()
def _inputs_before(x_at, first, x_T, in_C, K: tl.constexpr):
    """Load the K inputs before token `first`, oldest first; zeros before the sequence."""
    past = ()
    for j in tl.static_range(K):
        x = _row(x_at + (j - K) * x_T, in_C & (first + j >= K))
        past += (x.to(tl.float32),)
    return past


@jit()
def _row(at, mask):
    return tl.load(at, mask=mask, other=0.0)


@jit()
def _position(position_ptr, t, mask, PACKED: tl.constexpr):
    position = t
    if PACKED:
        position = tl.load(position_ptr + t, mask=mask, other=0)
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
