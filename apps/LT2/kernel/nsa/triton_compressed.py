"""Compressed attention and the choice of blocks on CUDA: our Triton kernels.

Flash attention (https://arxiv.org/abs/2307.08691) over the means of blocks. Forward also sums the
probabilities over the heads of a group, and chooses blocks by these sums. No atomics, so results
repeat to the bit.

A query sees the means first..seen: those from its document's first block to the last complete one.
Both numbers never decrease along a row, so a mean is seen by adjacent queries.

Shapes: B rows, T queries, C means, H query heads, G key/value heads, R = H / G, K head dim (KP:
padded), n chosen blocks. A tile is M queries (or Q queries with R heads) by N means.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.nsa.triton_tiles import (
    LOG2_E,
    Tile,
    attend_more,
    dkv_more,
    dq_more,
    jit_of_range,
    load_rows,
    logits_of,
    rows_of_tile,
    store_rows,
)
from apps.LT2.kernel.triton_jit import jit, tl, triton

# Importances that are in memory at a time, in elements: 128 MiB.
MAX_IMPORTANCES = 2**25
MIN_QUERIES = 16  # a multiple of all tiles
CHOICE_ELEMENTS = 2048  # importances that a program of the choice holds; more if one query has more
PARTS = 4  # programs that share the queries of a tile of means: few tiles exist


def attend_means(
    q_BTHK: Tensor,
    k_BCGK: Tensor,
    v_BCGK: Tensor,
    first_T: Tensor,
    own_T: Tensor,
    seen_T: Tensor,
    n_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o (B, T, H, K), the log-sum-exp (B, T, H) in base 2, and the chosen blocks.

    o and the log-sum-exp are zero for a query without complete blocks. chosen (B, T, G, n) int32
    counts from the document's first block, in ascending order; -1 fills unused slots.
    """
    (B, T, H, K), (C, G) = q_BTHK.shape, k_BCGK.shape[1:3]
    o_BTHK = torch.empty_like(q_BTHK)
    lse_BTH = q_BTHK.new_empty(B, T, H, dtype=torch.float32)
    chosen_BTGn = q_BTHK.new_empty(B, T, G, n_blocks, dtype=torch.int32)
    tile = Tile(K, H // G, C)
    padded = triton.next_power_of_2(C)
    queries = max(1, CHOICE_ELEMENTS // padded)  # of a program of the choice
    size = max(MIN_QUERIES, MAX_IMPORTANCES // (B * G * C) // MIN_QUERIES * MIN_QUERIES)
    for begin in range(0, T, size):
        end = min(begin + size, T)
        importance = q_BTHK.new_empty(B, end - begin, G, C, dtype=torch.float32)
        _means_attend_kernel[triton.cdiv(end - begin, tile.queries), B * G](
            q_BTHK,
            k_BCGK,
            v_BCGK,
            first_T,
            seen_T,
            o_BTHK,
            lse_BTH,
            importance,
            K**-0.5 * LOG2_E,
            begin,
            end,
            T,
            G,
            C,
            **tile.options,
        )
        _choose_kernel[triton.cdiv(end - begin, queries), B * G](
            importance,
            first_T,
            own_T,
            seen_T,
            chosen_BTGn,
            begin,
            end,
            T,
            G,
            C,
            n=n_blocks,
            NP=triton.next_power_of_2(n_blocks),
            CP=padded,
            Q=queries,
            num_warps=max(4, min(16, padded // 512)),
        )
    return o_BTHK, lse_BTH, chosen_BTGn


def differentiate_means(
    q_BTHK: Tensor,
    k_BCGK: Tensor,
    v_BCGK: Tensor,
    o_BTHK: Tensor,
    lse_BTH: Tensor,
    first_T: Tensor,
    seen_T: Tensor,
    do_BTHK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q and of the means; zero for means that no query sees."""
    (B, T, H, K), (C, G) = q_BTHK.shape, k_BCGK.shape[1:3]
    inputs, scale = (q_BTHK, k_BCGK, v_BCGK), K**-0.5
    scales, sizes = (scale * LOG2_E, scale), (T, G, C)
    dq_BTHK, delta_BTH = torch.empty_like(q_BTHK), torch.empty_like(lse_BTH)
    tile = Tile(K, H // G, C)
    _means_dq_kernel[triton.cdiv(T, tile.queries), B * G](
        *inputs,
        first_T,
        seen_T,
        o_BTHK,
        lse_BTH,
        delta_BTH,
        do_BTHK,
        dq_BTHK,
        *scales,
        *sizes,
        **tile.options,
    )

    # One program per query head, because programs per key head would be few.
    block_C = torch.arange(C, device=first_T.device, dtype=torch.int32)
    begin_C = torch.searchsorted(seen_T, block_C, right=True, out_int32=True)
    end_C = torch.searchsorted(first_T, block_C, right=True, out_int32=True)
    dk, dv = (k_BCGK.new_empty(PARTS, B, C, H, K, dtype=torch.float32) for _ in range(2))
    _means_dkv_kernel[triton.cdiv(C, tile.key["N"]), B * H, PARTS](
        *inputs,
        first_T,
        seen_T,
        begin_C,
        end_C,
        lse_BTH,
        delta_BTH,
        do_BTHK,
        dk,
        dv,
        *scales,
        *sizes,
        **tile.row,
        R=H // G,
        M=tile.rows,
        PARTS=PARTS,
        **tile.key,
    )
    dk, dv = (x.unflatten(3, (G, -1)).sum((0, 4)).to(k_BCGK.dtype) for x in (dk, dv))
    return dq_BTHK, dk, dv


# ---- kernels


@jit_of_range
def _means_attend_kernel(
    q,
    k,
    v,
    first,
    seen,
    o,
    lse,
    importance,
    scale,
    begin,
    end,
    T,
    G,
    C,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
):
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    top = begin + tl.program_id(0) * Q
    query_M, at_M, ok_M = rows_of_tile(top, b, g, end, T, G, R, RP, Q)
    first_M = tl.load(first + query_M, mask=ok_M, other=C)
    seen_M = tl.load(seen + query_M, mask=ok_M, other=0)
    lowest, highest = tl.min(first_M, 0), tl.max(seen_M, 0)
    q_MK = load_rows(q, at_M, ok_M, K, KP)
    largest_M = tl.full((Q * RP,), float("-inf"), tl.float32)
    total_M = tl.zeros((Q * RP,), tl.float32)
    o_MK = tl.zeros((Q * RP, KP), tl.float32)
    for left in range(lowest, highest, N):
        block_N = left + tl.arange(0, N)
        visible_MN = _visible(block_N, first_M, seen_M)
        at_N, ok_N = (b * C + block_N) * G + g, block_N < C
        k_NK = load_rows(k, at_N, ok_N, K, KP)
        v_NK = load_rows(v, at_N, ok_N, K, KP)
        s_MN = logits_of(q_MK, k_NK, visible_MN, scale)
        largest_M, total_M, o_MK = attend_more(s_MN, v_NK, largest_M, total_M, o_MK)
    sees_M = seen_M > first_M
    total_M = tl.where(sees_M, total_M, 1.0)
    lse_M = tl.where(sees_M, largest_M + tl.log2(total_M), 0.0)
    store_rows(o, o_MK / total_M[:, None], at_M, ok_M, K, KP)
    tl.store(lse + at_M, lse_M, mask=ok_M)

    query_Q = top + tl.arange(0, Q)
    row_Q = (b * (end - begin) + (query_Q - begin)) * G + g
    for left in range(lowest, highest, N):
        block_N = left + tl.arange(0, N)
        visible_MN = _visible(block_N, first_M, seen_M)
        k_NK = load_rows(k, (b * C + block_N) * G + g, block_N < C, K, KP)
        p_MN = tl.exp2(logits_of(q_MK, k_NK, visible_MN, scale) - lse_M[:, None])
        sum_QN = tl.sum(tl.reshape(p_MN, (Q, RP, N)), 1)
        at_QN = row_Q[:, None] * C + block_N[None, :]
        tl.store(importance + at_QN, sum_QN, mask=(query_Q < end)[:, None] & (block_N < C)[None, :])


@jit_of_range
def _choose_kernel(
    importance,
    first,
    own,
    seen,
    chosen,
    begin,
    end,
    T,
    G,
    C,
    n: tl.constexpr,
    NP: tl.constexpr,
    CP: tl.constexpr,
    Q: tl.constexpr,
):
    """Choose for Q queries. Importances, which are not negative, are in the order of their bits."""
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    query_Q = begin + tl.program_id(0) * Q + tl.arange(0, Q)
    ok_Q = query_Q < end
    first_Q = tl.load(first + query_Q, mask=ok_Q, other=0)
    own_Q = tl.load(own + query_Q, mask=ok_Q, other=0)
    seen_Q = tl.load(seen + query_Q, mask=ok_Q, other=0)
    block_C = tl.arange(0, CP)
    at_QC = ((b * (end - begin) + (query_Q - begin)) * G + g)[:, None] * C + block_C[None, :]
    sum_QC = tl.load(importance + at_QC, mask=_visible(block_C, first_Q, seen_Q), other=0.0)
    distance_QC = own_Q[:, None] - block_C[None, :]
    always_QC = (distance_QC == 0) | (distance_QC == 1) | (block_C[None, :] == first_Q[:, None])
    # At least 0, so that NaNs of either sign leave no slot unwritten.
    rank_QC = tl.maximum(sum_QC.to(tl.int32, bitcast=True), 0)
    rank_QC = tl.where(always_QC, 0x7F800000, rank_QC)
    rank_QC = tl.where((distance_QC < 0) | (block_C[None, :] < first_Q[:, None]), -1, rank_QC)

    # Find the rank of the last chosen block, bit by bit.
    n_Q = tl.minimum(own_Q - first_Q + 1, n)
    least_Q = tl.zeros((Q,), tl.int32)
    for i in range(31):
        higher_Q = least_Q | (1 << (30 - i))
        n_higher_Q = tl.sum((rank_QC >= higher_Q[:, None]).to(tl.int32), 1)
        least_Q = tl.where(n_higher_Q >= n_Q, higher_Q, least_Q)
    above_QC, equal_QC = rank_QC > least_Q[:, None], rank_QC == least_Q[:, None]
    # Of equal blocks the lower number wins.
    n_equal_Q = n_Q - tl.sum(above_QC.to(tl.int32), 1)
    wins_QC = equal_QC & (tl.cumsum(equal_QC.to(tl.int32), 1) <= n_equal_Q[:, None])
    taken_QC = above_QC | wins_QC
    slot_QC = tl.cumsum(taken_QC.to(tl.int32), 1) - 1
    row_Q = ((b * T + query_Q) * G + g) * n
    number_QC = block_C[None, :] - first_Q[:, None]
    tl.store(chosen + row_Q[:, None] + slot_QC, number_QC, mask=taken_QC & ok_Q[:, None])
    slot_N = tl.arange(0, NP)
    unused_QN = (slot_N[None, :] >= n_Q[:, None]) & (slot_N < n)[None, :] & ok_Q[:, None]
    tl.store(
        chosen + row_Q[:, None] + slot_N[None, :], tl.full((Q, NP), -1, tl.int32), mask=unused_QN
    )


@jit_of_range
def _means_dq_kernel(
    q,
    k,
    v,
    first,
    seen,
    o,
    lse,
    delta,
    do,
    dq,
    scale,
    dq_scale,
    T,
    G,
    C,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
):
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    query_M, at_M, ok_M = rows_of_tile(tl.program_id(0) * Q, b, g, T, T, G, R, RP, Q)
    first_M = tl.load(first + query_M, mask=ok_M, other=C)
    seen_M = tl.load(seen + query_M, mask=ok_M, other=0)
    q_MK = load_rows(q, at_M, ok_M, K, KP)
    do_MK = load_rows(do, at_M, ok_M, K, KP)
    o_MK = load_rows(o, at_M, ok_M, K, KP)
    lse_M = tl.load(lse + at_M, mask=ok_M, other=0.0)
    delta_M = tl.sum(o_MK.to(tl.float32) * do_MK.to(tl.float32), 1)
    tl.store(delta + at_M, delta_M, mask=ok_M)  # for _means_dkv_kernel
    dq_MK = tl.zeros((Q * RP, KP), tl.float32)
    for left in range(tl.min(first_M, 0), tl.max(seen_M, 0), N):
        block_N = left + tl.arange(0, N)
        visible_MN = _visible(block_N, first_M, seen_M)
        at_N, ok_N = (b * C + block_N) * G + g, block_N < C
        k_NK = load_rows(k, at_N, ok_N, K, KP)
        v_NK = load_rows(v, at_N, ok_N, K, KP)
        s_MN = logits_of(q_MK, k_NK, visible_MN, scale)
        dq_MK = dq_more(s_MN, lse_M, delta_M, do_MK, k_NK, v_NK, dq_MK)
    store_rows(dq, dq_MK * dq_scale, at_M, ok_M, K, KP)


@jit_of_range
def _means_dkv_kernel(
    q,
    k,
    v,
    first,
    seen,
    begin_of_block,
    end_of_block,
    lse,
    delta,
    do,
    dk,
    dv,
    scale,
    dk_scale,
    T,
    G,
    C,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
):
    H = G * R
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    part, left = tl.program_id(2), tl.program_id(0) * N
    block_N = left + tl.arange(0, N)
    at_N, ok_N = (b * C + block_N) * G + h // R, block_N < C
    k_NK = load_rows(k, at_N, ok_N, K, KP)
    v_NK = load_rows(v, at_N, ok_N, K, KP)
    dk_NK = tl.zeros((N, KP), tl.float32)
    dv_NK = tl.zeros((N, KP), tl.float32)
    last = tl.minimum(left + N, C) - 1
    begin, end = tl.load(begin_of_block + left), tl.load(end_of_block + last)
    for top in range(begin + part * M, end, PARTS * M):
        query_M = top + tl.arange(0, M)
        ok_M = query_M < T
        at_M = (b * T + query_M) * H + h
        first_M = tl.load(first + query_M, mask=ok_M, other=C)
        seen_M = tl.load(seen + query_M, mask=ok_M, other=0)
        visible_NM = (block_N[:, None] >= first_M[None, :]) & (block_N[:, None] < seen_M[None, :])
        q_MK = load_rows(q, at_M, ok_M, K, KP)
        do_MK = load_rows(do, at_M, ok_M, K, KP)
        lse_M = tl.load(lse + at_M, mask=ok_M, other=0.0)
        delta_M = tl.load(delta + at_M, mask=ok_M, other=0.0)
        dk_NK, dv_NK = dkv_more(
            q_MK, k_NK, v_NK, do_MK, visible_NM, lse_M, delta_M, scale, dk_NK, dv_NK
        )
    at_N = ((part * (tl.num_programs(1) // H) + b) * C + block_N) * H + h
    store_rows(dk, dk_NK * dk_scale, at_N, ok_N, K, KP)
    store_rows(dv, dv_NK, at_N, ok_N, K, KP)


@jit()
def _visible(block_N, first_M, seen_M):
    """Return (M, N): whether a query sees a mean."""
    return (block_N[None, :] >= first_M[:, None]) & (block_N[None, :] < seen_M[:, None])
