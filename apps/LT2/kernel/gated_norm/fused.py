"""The gated RMSNorm of training on CUDA: one kernel forward, one backward.

A program normalizes some rows at a time, a row being one head of one token. In backward it keeps
the sum of its rows' weight gradients, and torch adds the sums of all programs: no atomics, so
results repeat. Shapes: B sequences, T tokens, H heads, V value dim.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.triton_jit import jit, tl

ELEMENTS = 2048  # of a tile; four warps then need at most 96 registers, and five programs fit an SM
PROGRAMS = 1320  # in backward, two rounds of an H200
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernel_supports(x_BTHV: Tensor, gate_BTHV: Tensor) -> bool:
    """Return whether the kernels support x and gate.

    A gate of another dtype was just computed in fp32: compiled, its sum is part of the norm's code.
    """
    return (
        x_BTHV.is_cuda
        and x_BTHV.ndim == 4
        and x_BTHV.dtype in DTYPES
        and gate_BTHV.dtype == x_BTHV.dtype
        and x_BTHV.shape[-1] <= ELEMENTS
    )


@torch.library.custom_op("lt2::gated_norm", mutates_args=())
def gated_norm_fused(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """Return `gated_norm` of x and gate (B, T, H, V). gate may be a part of each token's row."""
    x, gate = x.contiguous(), _strided_tokens(gate)
    y = torch.empty_like(x)
    n_rows, constants = _layout(x, silu)
    with torch.cuda.device_of(x):
        _gated_norm_forward_kernel[(-(-n_rows // constants["ROWS"]),)](
            *(x, gate, weight, y, n_rows, gate.stride(1), gate.stride(2), eps), **constants
        )
    return y


gated_norm_fused.register_fake(lambda x, *_: x.new_empty(x.shape))


@torch.library.custom_op("lt2::gated_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate and weight."""
    dy, x, gate = dy.contiguous(), x.contiguous(), _strided_tokens(gate)
    dx, dgate = torch.empty_like(x), torch.empty_like(x)
    n_rows, constants = _layout(x, silu)
    n_programs = min(PROGRAMS, -(-n_rows // constants["ROWS"]))
    sums = x.new_empty(n_programs, x.shape[-1], dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gated_norm_backward_kernel[(n_programs,)](
            *(dy, x, gate, weight, dx, dgate, sums, n_rows, gate.stride(1), gate.stride(2), eps),
            **constants,
        )
    return dx, dgate, sums.sum(0).to(weight.dtype)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.silu), None, None


gated_norm_fused.register_autograd(_differentiate, setup_context=_save)


def _strided_tokens(gate_BTHV: Tensor) -> Tensor:
    """Return gate unchanged if the tokens of all sequences are one stride apart."""
    T, (batch, token, _, value) = gate_BTHV.shape[1], gate_BTHV.stride()
    return gate_BTHV if value == 1 and batch == T * token else gate_BTHV.contiguous()


def _layout(x_BTHV: Tensor, silu: bool) -> tuple[int, dict[str, Any]]:
    *_, H, V = x_BTHV.shape
    block = 1 << (V - 1).bit_length()
    constants = {"H": H, "V": V, "ROWS": max(1, ELEMENTS // block), "BLOCK_V": block, "SILU": silu}
    return x_BTHV.numel() // V, constants


@jit()
def _gated_norm_forward_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    n_rows,
    gate_T,
    gate_H,
    eps,
    H: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SILU: tl.constexpr,
):
    at_V = tl.arange(0, BLOCK_V)
    weight = tl.load(weight_ptr + at_V, mask=at_V < V, other=0.0).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < n_rows)[:, None] & (at_V < V)[None, :]
    at = row[:, None] * V + at_V[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = _load_gate(gate_ptr, row, at_V, mask, gate_T, gate_H, H)
    scale = tl.rsqrt(tl.sum(x * x, 1) / V + eps)
    factor = tl.sigmoid(gate)
    if SILU:
        factor *= gate
    y = x * scale[:, None] * weight[None, :] * factor
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit()
def _gated_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    gate_ptr,
    weight_ptr,
    dx_ptr,
    dgate_ptr,
    sums_ptr,
    n_rows,
    gate_T,
    gate_H,
    eps,
    H: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SILU: tl.constexpr,
):
    at_V = tl.arange(0, BLOCK_V)
    weight = tl.load(weight_ptr + at_V, mask=at_V < V, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for first in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < n_rows)[:, None] & (at_V < V)[None, :]
        at = row[:, None] * V + at_V[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gate = _load_gate(gate_ptr, row, at_V, mask, gate_T, gate_H, H)
        scale = tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None]
        normed = x * scale
        factor = tl.sigmoid(gate)
        slope = factor * (1 - factor)
        if SILU:
            slope = factor + gate * slope
            factor *= gate
        dweight += dy * normed * factor
        dgate = dy * normed * weight[None, :] * slope
        tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        dnormed = dy * weight[None, :] * factor
        mean = (tl.sum(dnormed * normed, 1) / V)[:, None]
        dx = scale * (dnormed - normed * mean)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + tl.program_id(0) * V + at_V, tl.sum(dweight, 0), mask=at_V < V)


@jit()
def _load_gate(gate_ptr, row, at_V, mask, gate_T, gate_H, H: tl.constexpr):
    start = (row // H) * gate_T + (row % H) * gate_H
    return tl.load(gate_ptr + start[:, None] + at_V[None, :], mask=mask, other=0.0).to(tl.float32)
