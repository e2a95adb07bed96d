"""The updates of skipped loops on a GPU: one launch for all copies, and one for all states.

A row of a table holds the addresses of one update. Shapes as in `SlotCopy` and `DeltaUpdate`.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.triton_jit import jit, tl, triton

Upload = Callable[[Sequence[Sequence[int]], torch.device], Tensor]
COPY_BLOCK = 1024  # elements of a token that a program copies
BLOCK_V = 64  # columns of a state at a time


def launch_copies(copies: Sequence[Any], upload: Upload) -> None:
    """Run `SlotCopy`s; tokens of the same size and dtype share a launch."""
    groups: dict[Any, list[Any]] = {}
    for copy in copies:
        size = copy.slots[0, 0].numel()
        assert copy.source.dtype == copy.slots.dtype and copy.source[0, 0].numel() == size
        assert copy.source.is_contiguous() and copy.slots.is_contiguous()
        groups.setdefault((size, copy.slots.dtype), []).append(copy)
    for (size, _), group in groups.items():
        first = group[0]
        numbers = [
            [
                copy.source.data_ptr(),
                copy.slots.data_ptr(),
                copy.source.shape[1],
                copy.slots.shape[1],
                copy.length_B.data_ptr(),
            ]
            for copy in group
        ]
        table = upload(numbers, first.slots.device)
        block = min(triton.next_power_of_2(size), COPY_BLOCK)
        grid = (len(group), len(first.length_B), triton.cdiv(size, block))
        with torch.cuda.device_of(table):
            _copy_kernel[grid](table, first.source_length_B, first.slots, size, BLOCK=block)


def launch_updates(updates: Sequence[Any], upload: Upload) -> None:
    """Run `DeltaUpdate`s; updates of the same shapes, strides and dtypes share a launch."""
    groups: dict[Any, list[Any]] = {}
    for update in updates:
        *tensors, neg_eigval = update
        form = tuple((x.shape, x.stride(), x.dtype) for x in tensors)
        groups.setdefault((form, neg_eigval), []).append(update)
    for group in groups.values():
        first = group[0]
        B, H, K, V = first.state_BHKV.shape
        numbers = [[x.data_ptr() for x in update[:-1]] for update in group]
        table = upload(numbers, first.state_BHKV.device)
        with torch.cuda.device_of(table):
            _update_kernel[(B * H, len(group))](
                table,
                *first[:-1],
                first.x_BC.stride(0),
                first.a_BH.stride(0),
                first.b_BH.stride(0),
                H,
                K=K,
                V=V,
                PAST=first.conv_state_BSC.shape[1],
                BLOCK_K=triton.next_power_of_2(K),
                BLOCK_V=min(triton.next_power_of_2(V), BLOCK_V),
                NEG_EIGVAL=first.allow_neg_eigval,
                num_warps=4,
            )


@jit()
def _copy_kernel(table_ptr, source_length_ptr, slots_like, size, BLOCK: tl.constexpr):
    row = table_ptr + tl.program_id(0) * 5
    b = tl.program_id(1).to(tl.int64)
    source_ptr = tl.load(row).to(slots_like.dtype)
    slots_ptr = tl.load(row + 1).to(slots_like.dtype)
    n_source, n_slots = tl.load(row + 2), tl.load(row + 3)
    length_ptr = tl.load(row + 4).to(source_length_ptr.dtype)
    length = tl.load(source_length_ptr + b)
    source_at = b * n_source + (length - 1) % n_source
    slot_at = b * n_slots + (length - 1) % n_slots
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(source_ptr + source_at * size + at, mask=inside)
    tl.store(slots_ptr + slot_at * size + at, x, mask=inside)
    tl.store(length_ptr + b, length)  # every program writes the same


@jit()
def _convolve(x_row, weight_ptr, state_row, at, inside, C, PAST: tl.constexpr):
    """Return the convolution with SiLU for channels `at`, and move the past inputs by one."""
    x = tl.load(x_row + at, mask=inside, other=0.0)
    weight_at = weight_ptr + at * (PAST + 1)
    y = x.to(tl.float32) * tl.load(weight_at + PAST, mask=inside, other=0.0).to(tl.float32)
    past = ()
    for j in tl.static_range(PAST):
        past = past + (tl.load(state_row + j * C + at, mask=inside, other=0.0),)
        weight = tl.load(weight_at + j, mask=inside, other=0.0)
        y += past[j].to(tl.float32) * weight.to(tl.float32)
    # Several warps hold the same channels: all must read the past before one overwrites it.
    tl.debug_barrier()
    for j in tl.static_range(1, PAST):
        tl.store(state_row + (j - 1) * C + at, past[j], mask=inside)
    kept = x.to(state_row.dtype.element_ty)
    tl.store(state_row + (PAST - 1) * C + at, kept, mask=inside)
    # Rounded where a step rounds.
    return (y / (1 + tl.exp(-y))).to(x.dtype).to(tl.float32)


@jit()
def _update_kernel(
    table_ptr,
    x_like,
    a_like,
    b_like,
    weight_like,
    A_log_like,
    dt_bias_like,
    conv_state_like,
    state_like,
    x_B,
    a_B,
    b_B,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    PAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NEG_EIGVAL: tl.constexpr,
):
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    C = H * (2 * K + V)
    row = table_ptr + tl.program_id(1) * 8
    x_row = tl.load(row).to(x_like.dtype) + b * x_B
    a_ptr, b_ptr = tl.load(row + 1).to(a_like.dtype), tl.load(row + 2).to(b_like.dtype)
    weight_ptr = tl.load(row + 3).to(weight_like.dtype)
    A_log_ptr = tl.load(row + 4).to(A_log_like.dtype)
    dt_bias_ptr = tl.load(row + 5).to(dt_bias_like.dtype)
    conv_row = tl.load(row + 6).to(conv_state_like.dtype) + b * PAST * C
    state_ptr = tl.load(row + 7).to(state_like.dtype) + bh * K * V
    at_K = tl.arange(0, BLOCK_K)
    in_K = at_K < K
    # The output isn't needed, so q only becomes a past input.
    _convolve(x_row, weight_ptr, conv_row, h * K + at_K, in_K, C, PAST)
    k = _convolve(x_row, weight_ptr, conv_row, (H + h) * K + at_K, in_K, C, PAST)
    k = tl.where(in_K, k, 0.0)
    k = (k * tl.rsqrt(tl.sum(k * k, axis=0) + 1e-6)).to(x_like.dtype.element_ty).to(tl.float32)
    a = tl.load(a_ptr + b * a_B + h).to(tl.float32) + tl.load(dt_bias_ptr + h).to(tl.float32)
    softplus = tl.where(a > 20, a, tl.log(1 + tl.exp(a)))
    keep = tl.exp(-tl.exp(tl.load(A_log_ptr + h).to(tl.float32)) * softplus)
    beta = 1 / (1 + tl.exp(-tl.load(b_ptr + b * b_B + h).to(tl.float32)))
    if NEG_EIGVAL:
        beta *= 2
    for part in range(0, V, BLOCK_V):
        at_V = part + tl.arange(0, BLOCK_V)
        in_V = at_V < V
        v = _convolve(x_row, weight_ptr, conv_row, 2 * H * K + h * V + at_V, in_V, C, PAST)
        inside = in_K[:, None] & in_V[None, :]
        state_at = state_ptr + at_K[:, None] * V + at_V[None, :]
        S = tl.load(state_at, mask=inside, other=0.0) * keep
        S += k[:, None] * ((v - tl.sum(S * k[:, None], axis=0)) * beta)[None, :]
        tl.store(state_at, S, mask=inside)
