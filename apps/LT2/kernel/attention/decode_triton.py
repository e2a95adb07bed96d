"""Decode attention on CUDA, split over the slots of the cache.

A step is bound by reading the cache, so all multiprocessors must read: several programs share the
slots of a row, and a second kernel combines their partial softmaxes (Flash-Decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The query heads of a key/value head share
one read. Empty slots are not read.

Shapes as in `decode_attention`; R = H / G, P parts.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.triton_jit import jit, tl, triton

BLOCK_S = 64  # slots per iteration
MIN_SLOTS = 4 * BLOCK_S  # per part: with fewer, combining parts costs more than it saves
MAX_STAGED_BYTES = 512  # of a head in one slot
PROGRAMS = 1024  # several for each multiprocessor of the largest GPUs


def launch(q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, n_valid_B: Tensor) -> Tensor:
    B, H, K = q_BHK.shape
    S, G = k_BSGK.shape[1:3]
    assert k_BSGK.stride(3) == v_BSGK.stride(3) == 1, "the channels of a head must be contiguous"
    n_parts = max(min(triton.cdiv(PROGRAMS, B * G), triton.cdiv(S, MIN_SLOTS)), 1)
    slots = triton.cdiv(triton.cdiv(S, n_parts), BLOCK_S) * BLOCK_S  # per part
    sums_BHPK = torch.empty(B, H, n_parts, K, device=q_BHK.device, dtype=torch.float32)
    # per part: the maximum score, and the sum of exp(score - maximum)
    maximum_BHP, total_BHP = torch.empty(2, B, H, n_parts, device=q_BHK.device, dtype=torch.float32)
    o_BHK = q_BHK.new_empty(q_BHK.shape)
    block_K = max(triton.next_power_of_2(K), 16)
    sizes = {"K": K, "BLOCK_K": block_K, "num_warps": 4}
    # Prefetched iterations; for large heads only one fits in shared memory.
    num_stages = 3 if block_K * q_BHK.dtype.itemsize <= MAX_STAGED_BYTES else 1
    _attend_part[(B * G, n_parts)](
        q_BHK.contiguous(),
        k_BSGK,
        v_BSGK,
        n_valid_B.contiguous(),
        sums_BHPK,
        maximum_BHP,
        total_BHP,
        K**-0.5,
        G,
        slots,
        *k_BSGK.stride()[:3],
        *v_BSGK.stride()[:3],
        R=H // G,
        BLOCK_R=max(triton.next_power_of_2(H // G), 16),
        BLOCK_S=BLOCK_S,
        num_stages=num_stages,
        **sizes,
    )
    _combine_parts[(B * H,)](
        sums_BHPK,
        maximum_BHP,
        total_BHP,
        o_BHK,
        P=n_parts,
        BLOCK_P=triton.next_power_of_2(n_parts),
        **sizes,
    )
    return o_BHK


@jit(do_not_specialize=["slots"])
def _attend_part(
    q_ptr,
    k_ptr,
    v_ptr,
    n_valid_ptr,
    sums_ptr,
    maximum_ptr,
    total_ptr,
    scale,
    G,
    slots,
    k_B,
    k_S,
    k_G,
    v_B,
    v_S,
    v_G,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    bg, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, g = bg // G, bg % G
    n_parts = tl.num_programs(1)
    at_R, at_K = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    in_K = at_K < K
    head = bg * R + at_R  # index in B * H: the heads of a group are consecutive
    in_RK = (at_R < R)[:, None] & in_K[None, :]
    q = tl.load(q_ptr + head[:, None] * K + at_K[None, :], mask=in_RK, other=0.0)
    first = part * slots
    last = tl.minimum(first + slots, tl.load(n_valid_ptr + b).to(tl.int32))
    sums = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    maximum = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(first, last, BLOCK_S):
        at_S = start + tl.arange(0, BLOCK_S)
        in_S = at_S < last
        in_SK = in_S[:, None] & in_K[None, :]
        slot = at_S.to(tl.int64)[:, None]
        k = tl.load(k_ptr + b * k_B + slot * k_S + g * k_G + at_K[None, :], mask=in_SK, other=0.0)
        v = tl.load(v_ptr + b * v_B + slot * v_S + g * v_G + at_K[None, :], mask=in_SK, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(in_S[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_maximum[:, None])
        kept = tl.exp(maximum - new_maximum)
        sums = sums * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * kept + tl.sum(weights, axis=1)
        maximum = new_maximum
    at_P = head * n_parts + part
    tl.store(sums_ptr + at_P[:, None] * K + at_K[None, :], sums, mask=in_RK)
    tl.store(maximum_ptr + at_P, maximum, mask=at_R < R)
    tl.store(total_ptr + at_P, total, mask=at_R < R)


@jit()
def _combine_parts(
    sums_ptr,
    maximum_ptr,
    total_ptr,
    o_ptr,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    at_P, at_K = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    in_P, in_K = at_P < P, at_K < K
    maximum = tl.load(maximum_ptr + head * P + at_P, mask=in_P, other=float("-inf"))
    total = tl.load(total_ptr + head * P + at_P, mask=in_P, other=0.0)
    share = tl.exp(maximum - tl.max(maximum, axis=0))  # 0 for a part without valid slots
    sums = tl.load(
        sums_ptr + (head * P + at_P)[:, None] * K + at_K[None, :],
        mask=in_P[:, None] & in_K[None, :],
        other=0.0,
    )
    o = tl.sum(sums * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    tl.store(o_ptr + head * K + at_K, o.to(o_ptr.dtype.element_ty), mask=in_K)
