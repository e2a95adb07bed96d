"""Products of few rows on CUDA, with the norm before them and the gate or sum after them.

A decode step reads every weight once per loop for a handful of rows, so the time of a product is
the time to read its weight. The warps of a program split K: with so few rows, a single warp's chain
of tensor core products takes longer than the reads. With a norm, a program normalizes x once, holds
it, and computes several tiles of outputs.

A kernel may start before the previous one ends (programmatic dependent launch). With a norm it then
reads its first weights, and waits before it reads or writes what another kernel writes or reads.
For that the shared memory of two kernels must fit on a multiprocessor.

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
MAX_NORM_K = 4096  # inputs of a row that a program holds; half as many above MIN_ROWS rows


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
    **sizes: Any,
) -> Tensor:
    """Run the kernel; `sizes` replaces some of `kernel_sizes`, to measure them."""
    B, K = x_BK.shape
    N = weight_NK.shape[0] // 2 if swiglu else weight_NK.shape[0]
    assert norm_K is None or fits(B, K), f"{B} x {K} normed inputs are too many"
    sizes = kernel_sizes(B, weight_NK, held=norm_K is not None) | sizes
    programs = sizes.pop("programs")
    block_N = TILE_N // 2 if swiglu else TILE_N
    n_tiles = triton.cdiv(N, block_N)
    y_BN = x_BK.new_empty(B, N)
    _linear_kernel[(n_tiles if programs is None else min(programs, n_tiles),)](
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
        SWIGLU=swiglu,
        PAST=0 if conv_state_BSC is None else conv_state_BSC.shape[1],
        EARLY=early,
        **sizes,
        **({"launch_pdl": True} if early else {}),
    )
    return y_BN


def fits(B: int, K: int) -> bool:
    """Whether a program can hold x, besides a tile of the weight, in its shared memory."""
    return B <= MIN_ROWS and K <= MAX_NORM_K or K <= MAX_NORM_K // 2


def kernel_sizes(B: int, weight_NK: Tensor, *, held: bool) -> dict[str, Any]:
    """Return what decides the speed of the kernel; measured on an H200 at 1B (docs/LOG.md).

    programs    None for one a tile, which suits an x that isn't held
    SPLIT       parts of K, each summed alone; a multiple of num_warps
    BLOCK_K     inputs per iteration; all of them if x is held
    num_stages  of prefetch
    """
    (N, K), int8 = weight_NK.shape, weight_NK.dtype == torch.int8
    # Four warps that hold more than this of x spill registers.
    n_warps = 8 if held and max(B, MIN_ROWS) * K > MIN_ROWS * MAX_NORM_K // 2 else 4
    split = 8 if held and int8 else n_warps
    sizes: dict[str, Any] = {"programs": None, "SPLIT": split, "num_warps": n_warps}
    padded_K = max(triton.next_power_of_2(K), 16 * split)
    if not held:
        # With 4 stages, the next kernel fits beside this one. A longer sum gains more from 6.
        n_stages = 5 if int8 else 4 if N >= 2048 and K <= 4096 else 6
        return sizes | {"BLOCK_K": min(1024 if int8 else 512, padded_K), "num_stages": n_stages}
    n_programs = 132
    if weight_NK.is_cuda:
        n_programs = torch.cuda.get_device_properties(weight_NK.device).multi_processor_count
    return sizes | {"programs": 2 * n_programs, "BLOCK_K": padded_K, "num_stages": 2}


@jit(do_not_specialize=["B"])
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
        if norm_ptr is None:
            tl.extra.cuda.gdc_wait()
    n: tl.constexpr = BLOCK_K // SPLIT  # channels of a part of K
    at_B = tl.arange(0, BLOCK_B)
    at_K = tl.arange(0, SPLIT)[:, None, None] * n + tl.arange(0, n)[None, None, :]
    in_B, in_K = (at_B < B)[None, :, None], at_K < K
    x_at = x_ptr + at_B[None, :, None] * x_B + at_K
    # Only what the products read is prefetched (num_stages of the kernel, not of a loop): a state
    # must not be read before the wait.
    if norm_ptr is None:
        tile = tl.program_id(0)
        row, in_row, at_N, scale = _tile(tile, N, scale_ptr, BLOCK_N, SWIGLU)
        weight_at = weight_ptr + row[None, :, None].to(tl.int64) * K + at_K
        sums = tl.zeros([SPLIT, row.shape[0], BLOCK_B], tl.float32)
        added = _added(
            residual_ptr,
            conv_weight_ptr,
            conv_bias_ptr,
            conv_state_ptr,
            at_N,
            at_B,
            B,
            N,
            C,
            residual_B,
            PAST,
        )
        for k in range(0, K, BLOCK_K):
            in_K = at_K + k < K
            weight = tl.load(weight_at + k, mask=in_K & in_row[None, :, None], other=0.0)
            x = tl.load(x_at + k, mask=in_K & in_B, other=0.0)
            sums = tl.dot(weight.to(x.dtype), tl.trans(x, (0, 2, 1)), sums)
        _finish(
            sums,
            scale,
            added,
            conv_weight_ptr,
            conv_state_ptr,
            y_ptr,
            at_N,
            at_B,
            B,
            N,
            C,
            SWIGLU,
            PAST,
        )
    else:
        # Loaded flat: else its layout is forced on x, which passes through shared memory.
        flat = tl.arange(0, BLOCK_K)
        norm = tl.load(norm_ptr + flat, mask=flat < K, other=0.0).to(tl.float32)
        norm = tl.reshape(norm, [SPLIT, 1, n])
        x = tl.zeros([SPLIT, n, BLOCK_B], x_ptr.dtype.element_ty)
        n_tiles = tl.cdiv(N, BLOCK_N)
        for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
            row, in_row, at_N, scale = _tile(tile, N, scale_ptr, BLOCK_N, SWIGLU)
            weight_at = weight_ptr + row[None, :, None].to(tl.int64) * K + at_K
            weight = tl.load(weight_at, mask=in_K & in_row[None, :, None], other=0.0)
            if tile == tl.program_id(0):
                if EARLY:
                    tl.extra.cuda.gdc_wait()
                x = _normed(x_at, norm, in_K & in_B, K, eps)
            added = _added(
                residual_ptr,
                conv_weight_ptr,
                conv_bias_ptr,
                conv_state_ptr,
                at_N,
                at_B,
                B,
                N,
                C,
                residual_B,
                PAST,
            )
            _finish(
                tl.dot(weight.to(x.dtype), x),
                scale,
                added,
                conv_weight_ptr,
                conv_state_ptr,
                y_ptr,
                at_N,
                at_B,
                B,
                N,
                C,
                SWIGLU,
                PAST,
            )


@jit()
def _normed(x_at, norm, inside, K, eps):
    """Return RMSNorm of x as (SPLIT, channels, B)."""
    x = tl.load(x_at, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    mean_square = tl.sum(tl.sum(wide * wide, axis=2), axis=0) / K
    wide *= tl.rsqrt(mean_square + eps)[None, :, None] * norm
    return tl.trans(wide.to(x.dtype), (0, 2, 1))


@jit()
def _tile(tile, N, scale_ptr, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """Return a tile's rows of the weight, which exist, its outputs, and the rows' scales.

    For SwiGLU the rows are gates, then what they multiply.
    """
    at_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if SWIGLU:
        i = tl.arange(0, 2 * BLOCK_N)
        n = tile * BLOCK_N + i % BLOCK_N
        row = tl.where(i < BLOCK_N, n, N + n)
    else:
        n = at_N
        row = n
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row, mask=n < N, other=0.0)[:, None]
    return row, n < N, at_N, scale


@jit()
def _added(
    residual_ptr,
    conv_weight_ptr,
    conv_bias_ptr,
    conv_state_ptr,
    at_N,
    at_B,
    B,
    N,
    C,
    residual_B,
    PAST: tl.constexpr,
):
    """Load what is added to a tile of outputs, (N, B) in fp32, before the product is known.

    It is the residual, or the convolution of the past inputs, which move by one.
    """
    y = tl.zeros([at_N.shape[0], at_B.shape[0]], tl.float32)
    if conv_weight_ptr is not None:
        in_C = (at_N < C)[:, None]
        inside = in_C & (at_B < B)[None, :]
        past_at = conv_state_ptr + at_B[None, :].to(tl.int64) * PAST * C + at_N[:, None]
        past = ()
        for j in tl.static_range(PAST):
            past = past + (tl.load(past_at + j * C, mask=inside, other=0.0),)
            at = conv_weight_ptr + at_N[:, None] * (PAST + 1) + j
            y += past[j].to(tl.float32) * tl.load(at, mask=in_C, other=0.0).to(tl.float32)
        # If several warps hold the same output, all must read the past before one overwrites it.
        tl.debug_barrier()
        for j in tl.static_range(1, PAST):
            tl.store(past_at + (j - 1) * C, past[j], mask=inside)
        if conv_bias_ptr is not None:
            y += tl.load(conv_bias_ptr + at_N[:, None], mask=in_C, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        inside = (at_B < B)[None, :] & (at_N < N)[:, None]
        at = residual_ptr + at_B[None, :] * residual_B + at_N[:, None]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return y


@jit()
def _finish(
    sums,
    scale,
    added,
    conv_weight_ptr,
    conv_state_ptr,
    y_ptr,
    at_N,
    at_B,
    B,
    N,
    C,
    SWIGLU: tl.constexpr,
    PAST: tl.constexpr,
):
    """Do what follows the product, given as sums over parts of K, and store it."""
    y = tl.sum(sums, axis=0) * scale
    if SWIGLU:
        pairs = tl.reshape(y, [2, at_N.shape[0], at_B.shape[0]])
        gate, up = tl.split(tl.permute(pairs, (1, 2, 0)))
        y = gate / (1 + tl.exp(-gate)) * up
    inside = (at_B < B)[None, :] & (at_N < N)[:, None]
    if conv_weight_ptr is not None:
        in_C = (at_N < C)[:, None]
        x = y.to(conv_state_ptr.dtype.element_ty)
        at = conv_state_ptr + (at_B[None, :].to(tl.int64) * PAST + PAST - 1) * C + at_N[:, None]
        tl.store(at, x, mask=inside & in_C)
        at = conv_weight_ptr + at_N[:, None] * (PAST + 1) + PAST
        z = added + x.to(tl.float32) * tl.load(at, mask=in_C, other=0.0).to(tl.float32)
        y = tl.where(in_C, z / (1 + tl.exp(-z)), y)
    else:
        y += added
    tl.store(y_ptr + at_B[None, :] * N + at_N[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)
