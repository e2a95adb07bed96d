"""Selected attention on CUDA: our Triton kernels.

Flash attention (https://arxiv.org/abs/2307.08691) over the chosen blocks. A tile of adjacent
queries reads the union of their blocks once, and masks the blocks that a query did not choose. For
the gradients of a block's keys and values, a program reads the queries that chose it from an
inverted list. Sums have a fixed order, without atomics, so results repeat to the bit.

Shapes: B rows, T queries, S tokens, C blocks, H query heads, G key/value heads, R = H / G, K head
dim (KP: padded), n chosen blocks. A tile is M rows (Q queries with R heads) by N keys.
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

# Query heads per program of dk and dv. Fewer heads give more programs, which balance the load, and
# more partial sums.
HEADS = 4


def attend_chosen(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    chosen_BTGn: Tensor,
    first_T: Tensor,
    start_C: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, K) and the log-sum-exp (B, T, H) in base 2.

    chosen counts from the block first_T of a query's document; -1 is no block. A query chooses a
    block once, in any slot.
    """
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    o_BTHK = torch.empty_like(q_BTHK)
    lse_BTH = q_BTHK.new_empty(B, T, H, dtype=torch.float32)
    tile = Tile(K, H // G, block_size)
    _attend_kernel[triton.cdiv(T, tile.queries), B * G](
        q_BTHK,
        k_BSGK,
        v_BSGK,
        *_blocks_of_tiles(chosen_BTGn, first_T, start_C, tile),
        o_BTHK,
        lse_BTH,
        K**-0.5 * LOG2_E,
        T,
        S,
        G,
        n=chosen_BTGn.shape[-1],
        SIZE=block_size,
        **tile.options,
    )
    return o_BTHK, lse_BTH


def differentiate_chosen(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    o_BTHK: Tensor,
    lse_BTH: Tensor,
    chosen_BTGn: Tensor,
    first_T: Tensor,
    start_C: Tensor,
    length_C: Tensor,
    block_size: int,
    do_BTHK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    inputs, scale = (q_BTHK, k_BSGK, v_BSGK), K**-0.5
    scales, sizes = (scale * LOG2_E, scale), (T, S, G)
    dq_BTHK, delta_BTH = torch.empty_like(q_BTHK), torch.empty_like(lse_BTH)
    tile = Tile(K, H // G, block_size)
    _dq_kernel[triton.cdiv(T, tile.queries), B * G](
        *inputs,
        *_blocks_of_tiles(chosen_BTGn, first_T, start_C, tile),
        o_BTHK,
        lse_BTH,
        delta_BTH,
        do_BTHK,
        dq_BTHK,
        *scales,
        *sizes,
        n=chosen_BTGn.shape[-1],
        SIZE=block_size,
        **tile.options,
    )

    heads = min(HEADS, tile.padded_group)
    n_parts = triton.cdiv(H // G, heads)
    dk, dv = (k_BSGK.new_empty(n_parts, B, S, G, K, dtype=torch.float32) for _ in range(2))
    n_tiles = triton.cdiv(block_size, tile.key["N"])
    # Programs of the first block start first, as every query chooses it.
    _dkv_kernel[B * G * n_parts, len(start_C) * n_tiles](
        *inputs,
        *_queries_of_blocks(chosen_BTGn, first_T, len(start_C)),
        start_C,
        length_C,
        lse_BTH,
        delta_BTH,
        do_BTHK,
        dk,
        dv,
        *scales,
        *sizes,
        len(start_C),
        **tile.row,
        R=H // G,
        M=tile.rows,
        HEADS=heads,
        N_PARTS=n_parts,
        N_TILES=n_tiles,
        **tile.key,
    )
    return dq_BTHK, dk.sum(0).to(k_BSGK.dtype), dv.sum(0).to(v_BSGK.dtype)


def _blocks_of_tiles(
    chosen_BTGn: Tensor, first_T: Tensor, start_C: Tensor, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Return for each tile the union of its queries' blocks, and the number of these.

    An entry is int64: the block's first token, and in the lower 16 bits who chose it.
    """
    B, T, G, n = chosen_BTGn.shape
    n_tiles = triton.cdiv(T, tile.queries)
    entries = chosen_BTGn.new_empty(B * G, n_tiles, tile.queries * n, dtype=torch.int64)
    counts = chosen_BTGn.new_empty(B * G, n_tiles)
    _unite_kernel[n_tiles, B * G](
        chosen_BTGn,
        first_T,
        start_C,
        entries,
        counts,
        T,
        G,
        n=n,
        NP=triton.next_power_of_2(n),
        Q=tile.queries,
        LP=triton.next_power_of_2(tile.queries * n),
    )
    return entries, counts


def _queries_of_blocks(
    chosen_BTGn: Tensor, first_T: Tensor, n_blocks: int
) -> tuple[Tensor, Tensor]:
    """Return the queries that chose each block, sorted by row, head, block and query, int32.

    The queries of block c for row b and head g start at offsets[(b G + g) C + c].
    """
    B, T, G, n = chosen_BTGn.shape
    n_lists = B * G * n_blocks
    head_BTGn = torch.arange(B * G, device=chosen_BTGn.device).view(B, 1, G, 1)
    number = chosen_BTGn + first_T[:, None, None] + head_BTGn * n_blocks
    number = torch.where(chosen_BTGn < 0, n_lists, number)
    # A radix sort of 16 bits has half as many passes.
    dtype = torch.int16 if n_lists < 2**15 else torch.int32
    numbers, order = number.flatten().to(dtype).sort(stable=True)
    bounds = torch.arange(n_lists + 1, device=number.device).to(dtype)
    offsets = torch.searchsorted(numbers, bounds, out_int32=True)
    return (order // (G * n) % T).int(), offsets


# ---- kernels


@jit()
def _unite_kernel(
    chosen,
    first,
    start,
    entries,
    counts,
    T,
    G,
    n: tl.constexpr,
    NP: tl.constexpr,
    Q: tl.constexpr,
    LP: tl.constexpr,
):
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    top = tl.program_id(0) * Q
    i = tl.arange(0, LP)
    place_L = i // n  # of a query in the tile
    query_L = top + place_L
    ok_L = (place_L < Q) & (query_L < T)
    block_L = tl.load(chosen + ((b * T + query_L) * G + g) * n + i % n, mask=ok_L, other=-1)
    ok_L = block_L >= 0
    block_L += tl.load(first + query_L, mask=ok_L, other=0)
    who_L = tl.zeros((LP,), tl.int32)
    earlier_L = tl.zeros((LP,), tl.int32)
    slot = tl.arange(0, NP)
    for other in range(Q):
        query = top + other
        at = chosen + ((b * T + query) * G + g) * n + slot
        block_N = tl.load(at, mask=(slot < n) & (query < T), other=-1)
        ok_N = block_N >= 0
        block_N += tl.load(first + tl.minimum(query, T - 1))
        equal_LN = (block_L[:, None] == block_N[None, :]) & ok_N[None, :]
        chose_L = tl.max(equal_LN.to(tl.int32), 1)
        who_L |= chose_L << other
        earlier_L |= tl.where(other < place_L, chose_L, 0)
    new_L = ok_L & (earlier_L == 0)
    at_L = tl.cumsum(new_L.to(tl.int32), 0) - 1
    token_L = tl.load(start + block_L, mask=new_L, other=0).to(tl.int64)
    tl.store(entries + tile * (Q * n) + at_L, (token_L << 16) | who_L, mask=new_L)
    tl.store(counts + tile, tl.sum(new_L.to(tl.int32), 0))


@jit()
def _keys_of_entry(
    entry, part, query_M, S, T, RP: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr
):
    """Return the token of N keys of a block, and (M, N): whether a row sees it.

    Only the end of a query's own block is in its future, so this also ends a document's last block.
    """
    i = part * N + tl.arange(0, N)
    token_N = (entry >> 16).to(tl.int32) + i
    r = tl.arange(0, query_M.shape[0])
    chose_M = ((entry >> (r // RP)) & 1) != 0
    past_MN = (token_N[None, :] <= (S - T) + query_M[:, None]) & (i < SIZE)[None, :]
    return token_N, chose_M[:, None] & past_MN


@jit()
def _attend_kernel(
    q,
    k,
    v,
    entries,
    counts,
    o,
    lse,
    scale,
    T,
    S,
    G,
    n: tl.constexpr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
):
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    number = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + number
    query_M, at_M, ok_M = rows_of_tile(number * Q, b, g, T, T, G, R, RP, Q)
    q_MK = load_rows(q, at_M, ok_M, K, KP)
    largest_M = tl.full((Q * RP,), float("-inf"), tl.float32)
    total_M = tl.zeros((Q * RP,), tl.float32)
    o_MK = tl.zeros((Q * RP, KP), tl.float32)
    PARTS: tl.constexpr = (SIZE + N - 1) // N
    for i in range(tl.load(counts + tile) * PARTS):
        entry = tl.load(entries + tile * (Q * n) + i // PARTS)
        token_N, visible_MN = _keys_of_entry(entry, i % PARTS, query_M, S, T, RP, N, SIZE)
        at_N, ok_N = (b * S + token_N) * G + g, token_N < S
        k_NK = load_rows(k, at_N, ok_N, K, KP)
        v_NK = load_rows(v, at_N, ok_N, K, KP)
        s_MN = logits_of(q_MK, k_NK, visible_MN, scale)
        largest_M, total_M, o_MK = attend_more(s_MN, v_NK, largest_M, total_M, o_MK)
    store_rows(o, o_MK / total_M[:, None], at_M, ok_M, K, KP)
    tl.store(lse + at_M, largest_M + tl.log2(total_M), mask=ok_M)


@jit()
def _dq_kernel(
    q,
    k,
    v,
    entries,
    counts,
    o,
    lse,
    delta,
    do,
    dq,
    scale,
    dq_scale,
    T,
    S,
    G,
    n: tl.constexpr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
):
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    number = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + number
    query_M, at_M, ok_M = rows_of_tile(number * Q, b, g, T, T, G, R, RP, Q)
    q_MK = load_rows(q, at_M, ok_M, K, KP)
    do_MK = load_rows(do, at_M, ok_M, K, KP)
    o_MK = load_rows(o, at_M, ok_M, K, KP)
    lse_M = tl.load(lse + at_M, mask=ok_M, other=0.0)
    delta_M = tl.sum(o_MK.to(tl.float32) * do_MK.to(tl.float32), 1)
    tl.store(delta + at_M, delta_M, mask=ok_M)  # for _dkv_kernel
    dq_MK = tl.zeros((Q * RP, KP), tl.float32)
    PARTS: tl.constexpr = (SIZE + N - 1) // N
    for i in range(tl.load(counts + tile) * PARTS):
        entry = tl.load(entries + tile * (Q * n) + i // PARTS)
        token_N, visible_MN = _keys_of_entry(entry, i % PARTS, query_M, S, T, RP, N, SIZE)
        at_N, ok_N = (b * S + token_N) * G + g, token_N < S
        k_NK = load_rows(k, at_N, ok_N, K, KP)
        v_NK = load_rows(v, at_N, ok_N, K, KP)
        s_MN = logits_of(q_MK, k_NK, visible_MN, scale)
        dq_MK = dq_more(s_MN, lse_M, delta_M, do_MK, k_NK, v_NK, dq_MK)
    store_rows(dq, dq_MK * dq_scale, at_M, ok_M, K, KP)


@jit_of_range
def _dkv_kernel(
    q,
    k,
    v,
    queries,
    offsets,
    start,
    length,
    lse,
    delta,
    do,
    dk,
    dv,
    scale,
    dk_scale,
    T,
    S,
    G,
    C,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    HEADS: tl.constexpr,
    N_PARTS: tl.constexpr,
    N_TILES: tl.constexpr,
    N: tl.constexpr,
):
    """Differentiate N keys of a block for HEADS query heads. Rows are queries and these heads."""
    bg, part = (tl.program_id(0) // N_PARTS).to(tl.int64), tl.program_id(0) % N_PARTS
    b, g = bg // G, bg % G
    block = tl.program_id(1) // N_TILES
    i = tl.program_id(1) % N_TILES * N + tl.arange(0, N)
    token_N = tl.load(start + block) + i
    ok_N = i < tl.load(length + block)
    at_N = (b * S + token_N) * G + g
    k_NK = load_rows(k, at_N, ok_N, K, KP)
    v_NK = load_rows(v, at_N, ok_N, K, KP)
    dk_NK = tl.zeros((N, KP), tl.float32)
    dv_NK = tl.zeros((N, KP), tl.float32)
    begin = tl.load(offsets + bg * C + block)
    n_rows = (tl.load(offsets + bg * C + block + 1) - begin) * HEADS
    head_M = part * HEADS + tl.arange(0, M) % HEADS
    for top in range(0, n_rows, M):
        row_M = top + tl.arange(0, M)
        ok_M = (row_M < n_rows) & (head_M < R)
        query_M = tl.load(queries + begin + row_M // HEADS, mask=row_M < n_rows, other=0)
        at_M = ((b * T + query_M) * G + g) * R + head_M
        q_MK = load_rows(q, at_M, ok_M, K, KP)
        do_MK = load_rows(do, at_M, ok_M, K, KP)
        lse_M = tl.load(lse + at_M, mask=ok_M, other=0.0)
        delta_M = tl.load(delta + at_M, mask=ok_M, other=0.0)
        past_NM = token_N[:, None] <= (S - T) + query_M[None, :]
        dk_NK, dv_NK = dkv_more(
            q_MK, k_NK, v_NK, do_MK, past_NM, lse_M, delta_M, scale, dk_NK, dv_NK
        )
    at_N += part.to(tl.int64) * (tl.num_programs(0) // N_PARTS) * S
    store_rows(dk, dk_NK * dk_scale, at_N, ok_N, K, KP)
    store_rows(dv, dv_NK, at_N, ok_N, K, KP)
