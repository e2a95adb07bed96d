"""Products of few rows on CUDA, with the norm before them and the gate or sum after them.

A decode step reads every weight once per loop for a handful of rows, so the time of a product is
the time to read its weight. The warps of a program split K: with so few rows, a single warp's chain
of tensor core products takes longer than the reads. With a norm, a program normalizes x once, keeps
it, and computes several tiles of outputs. A kernel may start before the previous one ends
(programmatic dependent launch), which hides its launch; it waits before it reads or writes.

Shapes as in `decode_linear`.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.triton_jit import jit, tl, triton

MIN_ROWS = 8  # of x in a tile: the least that tensor cores take
TILE_N = 16  # rows of the weight in a tile, likewise; for SwiGLU half of them are gates
SPLIT = 4  # warps of a program, and parts of K
MAX_NORM_K = 4096  # a program holds as much of x


def launch(
    x_BK: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor | None,
    norm_K: Tensor | None,
    eps: float,
    residual_BN: Tensor | None,
    swiglu: bool,
    conv_weight_CW: Tensor | None,
    conv_bias_C: Tensor | None,
    conv_state_BSC: Tensor | None,
    *,
    early: bool,
) -> Tensor:
    B, K = x_BK.shape
    N = weight_NK.shape[0] // 2 if swiglu else weight_NK.shape[0]
    block_N = TILE_N // 2 if swiglu else TILE_N
    n_tiles = triton.cdiv(N, block_N)
    y_BN = x_BK.new_empty(B, N)
    if norm_K is None:
        kernel, n_programs, sizes = _linear_kernel, n_tiles, _loop_sizes(K, weight_NK)
    else:
        assert K <= MAX_NORM_K, f"{K} normed inputs, at most {MAX_NORM_K}"
        kernel, (n_programs, sizes) = _norm_linear_kernel, _resident_sizes(K, weight_NK)
    kernel[(min(n_tiles, n_programs),)](
        x_BK,
        weight_NK,
        scale_N,
        norm_K,
        residual_BN,
        conv_weight_CW,
        conv_bias_C,
        conv_state_BSC,
        y_BN,
        B,
        N,
        K,
        0 if conv_weight_CW is None else conv_weight_CW.shape[0],
        x_BK.stride(0),
        0 if residual_BN is None else residual_BN.stride(0),
        eps,
        BLOCK_B=max(triton.next_power_of_2(B), MIN_ROWS),
        BLOCK_N=block_N,
        SPLIT=SPLIT,
        SWIGLU=swiglu,
        PAST=0 if conv_state_BSC is None else conv_state_BSC.shape[1],
        EARLY=early,
        num_warps=SPLIT,
        **sizes,
        **({"launch_pdl": True} if early else {}),
    )
    return y_BN


def _loop_sizes(K: int, weight_NK: Tensor) -> dict[str, Any]:
    """Return channels per iteration and stages of prefetch: about 80 KB in flight."""
    block_K, stages = (1024, 3) if weight_NK.dtype == torch.int8 else (512, 6)
    return {"BLOCK_K": min(block_K, _padded(K)), "num_stages": stages}


def _resident_sizes(K: int, weight_NK: Tensor) -> tuple[int, dict[str, Any]]:
    """Return the number of programs and the sizes of the kernel that holds x."""
    n_programs = 132
    if weight_NK.is_cuda:
        n_programs = torch.cuda.get_device_properties(weight_NK.device).multi_processor_count
    if weight_NK.dtype == torch.int8:  # two programs share a multiprocessor
        return 2 * n_programs, {"BLOCK_K": _padded(K), "STAGES": 2}
    return n_programs, {"BLOCK_K": _padded(K), "STAGES": 3 if K <= MAX_NORM_K // 2 else 2}


def _padded(K: int) -> int:
    return max(triton.next_power_of_2(K), 16 * SPLIT)


@jit()
def _linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    norm_ptr,
    residual_ptr,
    conv_weight_ptr,
    conv_bias_ptr,
    conv_state_ptr,
    y_ptr,
    B,
    N,
    K,
    C,
    x_B,
    residual_B,
    eps,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SWIGLU: tl.constexpr,
    PAST: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at_B, tile = tl.arange(0, BLOCK_B), tl.program_id(0)
    row, in_row = _rows_of_tile(tile, N, BLOCK_N, SWIGLU)
    at_K = _channels(BLOCK_K, SPLIT)
    x_at = x_ptr + at_B[None, :, None] * x_B + at_K
    weight_at = weight_ptr + row[None, :, None].to(tl.int64) * K + at_K
    sums = tl.zeros([SPLIT, row.shape[0], BLOCK_B], tl.float32)
    for k in range(0, K, BLOCK_K):
        in_K = at_K + k < K
        weight = tl.load(weight_at + k, mask=in_K & in_row[None, :, None], other=0.0)
        x = tl.load(x_at + k, mask=in_K & (at_B < B)[None, :, None], other=0.0)
        sums = tl.dot(weight.to(x.dtype), tl.trans(x, (0, 2, 1)), sums)
    _finish(
        tl.sum(sums, axis=0),
        row,
        in_row,
        tile * BLOCK_N + tl.arange(0, BLOCK_N),
        at_B,
        scale_ptr,
        residual_ptr,
        conv_weight_ptr,
        conv_bias_ptr,
        conv_state_ptr,
        y_ptr,
        B,
        N,
        C,
        residual_B,
        SWIGLU,
        PAST,
    )


@jit()
def _norm_linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    norm_ptr,
    residual_ptr,
    conv_weight_ptr,
    conv_bias_ptr,
    conv_state_ptr,
    y_ptr,
    B,
    N,
    K,
    C,
    x_B,
    residual_B,
    eps,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SWIGLU: tl.constexpr,
    PAST: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at_B, at_K = tl.arange(0, BLOCK_B), _channels(BLOCK_K, SPLIT)
    in_K = at_K < K
    x = tl.load(
        x_ptr + at_B[None, :, None] * x_B + at_K,
        mask=in_K & (at_B < B)[None, :, None],
        other=0.0,
    )
    wide = x.to(tl.float32)
    mean_square = tl.sum(tl.sum(wide * wide, axis=2), axis=0) / K
    wide *= tl.rsqrt(mean_square + eps)[None, :, None]
    wide *= tl.load(norm_ptr + at_K, mask=in_K, other=0.0).to(tl.float32)
    x = tl.trans(wide.to(x.dtype), (0, 2, 1))
    n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        row, in_row = _rows_of_tile(tile, N, BLOCK_N, SWIGLU)
        weight_at = weight_ptr + row[None, :, None].to(tl.int64) * K + at_K
        weight = tl.load(weight_at, mask=in_K & in_row[None, :, None], other=0.0)
        _finish(
            tl.sum(tl.dot(weight.to(x.dtype), x), axis=0),
            row,
            in_row,
            tile * BLOCK_N + tl.arange(0, BLOCK_N),
            at_B,
            scale_ptr,
            residual_ptr,
            conv_weight_ptr,
            conv_bias_ptr,
            conv_state_ptr,
            y_ptr,
            B,
            N,
            C,
            residual_B,
            SWIGLU,
            PAST,
        )


@jit()
def _channels(BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """Return the channels of each part of K, (SPLIT, 1, channels)."""
    n: tl.constexpr = BLOCK_K // SPLIT
    return tl.arange(0, SPLIT)[:, None, None] * n + tl.arange(0, n)[None, None, :]


@jit()
def _rows_of_tile(tile, N, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """Return the weight's rows for a tile of outputs: gates, then what they multiply, if SwiGLU."""
    if SWIGLU:
        i = tl.arange(0, 2 * BLOCK_N)
        n = tile * BLOCK_N + i % BLOCK_N
        row = tl.where(i < BLOCK_N, n, N + n)
    else:
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row = n
    return row, n < N


@jit()
def _finish(
    y,
    row,
    in_row,
    at_N,
    at_B,
    scale_ptr,
    residual_ptr,
    conv_weight_ptr,
    conv_bias_ptr,
    conv_state_ptr,
    y_ptr,
    B,
    N,
    C,
    residual_B,
    SWIGLU: tl.constexpr,
    PAST: tl.constexpr,
):
    """Do what follows the product y (rows of the tile, B), and store it."""
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + row, mask=in_row, other=0.0)[:, None]
    if SWIGLU:
        pairs = tl.reshape(y, [2, at_N.shape[0], at_B.shape[0]])
        gate, up = tl.split(tl.permute(pairs, (1, 2, 0)))
        y = gate / (1 + tl.exp(-gate)) * up
    in_BN = (at_B < B)[None, :] & (at_N < N)[:, None]
    if conv_weight_ptr is not None:
        convolved = _convolve(
            y.to(y_ptr.dtype.element_ty),
            conv_weight_ptr,
            conv_bias_ptr,
            conv_state_ptr + at_B[None, :].to(tl.int64) * PAST * C + at_N[:, None],
            at_N[:, None],
            in_BN & (at_N < C)[:, None],
            C,
            PAST,
        )
        y = tl.where((at_N < C)[:, None], convolved, y)
    if residual_ptr is not None:
        at = residual_ptr + at_B[None, :] * residual_B + at_N[:, None]
        y += tl.load(at, mask=in_BN, other=0.0).to(tl.float32)
    tl.store(y_ptr + at_B[None, :] * N + at_N[:, None], y.to(y_ptr.dtype.element_ty), mask=in_BN)


@jit()
def _convolve(x, weight_ptr, bias_ptr, past_ptr, at_C, inside, C, PAST: tl.constexpr):
    """Return silu(convolution) of new inputs x (N, B), in fp32, and shift the past inputs."""
    x = x.to(past_ptr.dtype.element_ty)
    at = weight_ptr + at_C * (PAST + 1)
    y = x.to(tl.float32) * tl.load(at + PAST, mask=at_C < C, other=0.0).to(tl.float32)
    for j in tl.static_range(PAST):
        past = tl.load(past_ptr + j * C, mask=inside, other=0.0)
        y += past.to(tl.float32) * tl.load(at + j, mask=at_C < C, other=0.0).to(tl.float32)
        if j > 0:
            tl.store(past_ptr + (j - 1) * C, past, mask=inside)
    tl.store(past_ptr + (PAST - 1) * C, x, mask=inside)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + at_C, mask=at_C < C, other=0.0).to(tl.float32)
    return y / (1 + tl.exp(-y))
