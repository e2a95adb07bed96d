"""Sparse attention on CUDA: Triton kernels that read the selected keys from a bit mask.

Flash attention (https://arxiv.org/abs/2307.08691) with one bit per query and key. Unselected keys
are masked, not skipped: a tile of 64 queries by 64 keys seldom has none selected. No atomics, so
results repeat to the bit.

Shapes: B batch, T tokens, H query heads, G key/value heads, K head dim (KP: the next power of 2),
X bytes of a row of the mask, Q queries in a block; a tile is M queries by N keys. Exponentials are
in base 2.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apps.LT2.kernel.documents import document_of_tokens
from apps.LT2.kernel.dsa.selection import as_words
from apps.LT2.kernel.triton_jit import jit, tl, triton

# No specialization on a block's position: it would compile new kernels.
jit_of_block = jit(do_not_specialize=["begin", "end"])

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Documents:
    """The document of each token, (T,) int32: it begins at `start` and ends before `stop`."""

    start_T: Tensor
    stop_T: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor | None, n_tokens: int, device: torch.device) -> Documents:
        if cu_seqlens is None:
            start = torch.zeros(n_tokens, dtype=torch.int32, device=device)
            return Documents(start, torch.full_like(start, n_tokens))
        document, _ = document_of_tokens(cu_seqlens, n_tokens)
        offsets = cu_seqlens.int()
        return Documents(offsets[document].contiguous(), offsets[document + 1].contiguous())


class KernelAttention:
    """Attention over the keys selected by `bits` (B, T, X), computed block by block; S is T.

    Set a block's bits before `attend`. All tensors are contiguous.
    """

    def __init__(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, bits_BTX: Tensor, documents: Documents
    ):
        B, T, H, K = q_BTHK.shape
        self.inputs = tuple(x.contiguous() for x in (q_BTHK, k_BTGK, v_BTGK))
        self.bits_BTX, self.documents = bits_BTX, documents
        self.words_BTX = as_words(bits_BTX)
        self.o_BTHK = torch.empty(B, T, H, K, dtype=q_BTHK.dtype, device=q_BTHK.device)
        # log2 of the sum of 2 ** logit, per query and head
        self.lse_BHT = torch.empty(B, H, T, dtype=torch.float32, device=q_BTHK.device)
        self.sizes = (T, H, k_BTGK.shape[2], self.words_BTX.shape[-1])
        self.scale, self.padded_dim = K**-0.5 * LOG2_E, padded_dim(K)

    def attend(self, begin: int, end: int) -> None:
        """Compute the outputs of the queries begin..end."""
        B, _, H, K = self.o_BTHK.shape
        tile = tile_of(self.padded_dim)
        _attend_kernel[triton.cdiv(end - begin, tile["M"]), B * H](
            *self.inputs,
            self.words_BTX,
            self.documents.start_T,
            self.o_BTHK,
            self.lse_BHT,
            self.scale,
            begin,
            end,
            *self.sizes,
            K=K,
            KP=self.padded_dim,
            **tile,
        )


def differentiate(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    bits_BTX: Tensor,
    cu_seqlens: Tensor | None,
    o_BTHK: Tensor,
    lse_BHT: Tensor,
    do_BTHK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q_BTHK, k_BTGK, v_BTGK, do_BTHK = (x.contiguous() for x in (q_BTHK, k_BTGK, v_BTGK, do_BTHK))
    documents = Documents.of(cu_seqlens, T, q_BTHK.device)
    scale, padded, words_BTX = K**-0.5, padded_dim(K), as_words(bits_BTX)
    inputs = (q_BTHK, k_BTGK, v_BTGK, words_BTX)
    sizes = (scale * LOG2_E, scale, T, H, G, words_BTX.shape[-1])
    options = {"K": K, "KP": padded, **tile_of(padded)}
    M, N = options["M"], options["N"]

    dq_BTHK, delta_BHT = torch.empty_like(q_BTHK), torch.empty_like(lse_BHT)
    rest = (lse_BHT, delta_BHT, do_BTHK)
    grid = (triton.cdiv(T, M), B * H)
    _dq_kernel[grid](*inputs, documents.start_T, o_BTHK, *rest, dq_BTHK, *sizes, **options)

    # One program per query head, even if heads share keys: programs per key head would be few, and
    # the first keys, which all queries see, would take long. Heads are summed afterwards.
    shared = H > G
    dtype = torch.float32 if shared else k_BTGK.dtype
    dk, dv = (k_BTGK.new_empty(B, T, H, K, dtype=dtype) for _ in range(2))
    grid = (triton.cdiv(T, N), B * H)
    _dkv_kernel[grid](*inputs, documents.stop_T, *rest, dk, dv, *sizes, **options)
    if shared:
        dk, dv = (x.unflatten(2, (G, -1)).sum(3).to(k_BTGK.dtype) for x in (dk, dv))
    return dq_BTHK, dk, dv


def padded_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


# padded head dim -> (M, N, warps, stages), the fastest of nine on an H100
TILES = {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)}


def tile_of(padded: int) -> dict[str, int]:
    m, n, warps, stages = TILES[min(dim for dim in TILES if dim >= padded)]
    return {"M": m, "N": n, "num_warps": warps, "num_stages": stages}


# ---- kernels


@jit()
def rows_of(x, b, tokens, ok, h, T, H, K: tl.constexpr, KP: tl.constexpr):
    """Load rows (len(tokens), KP) of head h of x (B, T, H, K); zeros beyond K or if not ok."""
    d = tl.arange(0, KP)
    at = ((b * T + tokens.to(tl.int64)) * H + h) * K
    return tl.load(x + at[:, None] + d[None, :], mask=ok[:, None] & (d < K)[None, :], other=0.0)


@jit()
def selection(words, b, rows, row_ok, left, T, X, N: tl.constexpr):
    """Return (M, N) bool: the selected of N keys from `left`, a multiple of N = 32 or 64."""
    at = words + (b * T + rows.to(tl.int64)) * X + left // 32
    n = tl.arange(0, N)
    word_MN = tl.load(at, mask=row_ok, other=0)[:, None]
    if N > 32:
        word_MN = tl.where(n[None, :] < 32, word_MN, tl.load(at + 1, mask=row_ok, other=0)[:, None])
    return ((word_MN >> (n % 32)[None, :]) & 1) != 0


@jit()
def logits_of(q_MK, k_NK, selected_MN, scale):
    """Return scaled products of queries and keys, -inf for unselected keys."""
    return tl.where(selected_MN, tl.dot(q_MK, tl.trans(k_NK)) * scale, float("-inf"))


@jit_of_block
def _attend_kernel(
    q,
    k,
    v,
    words,
    start,
    o,
    lse,
    scale,
    begin,
    end,
    T,
    H,
    G,
    X,
    K: tl.constexpr,
    KP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    g = h // (H // G)
    top = begin + (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the longest first
    rows = top + tl.arange(0, M)
    row_ok = rows < end
    q_MK = rows_of(q, b, rows, row_ok, h, T, H, K, KP)
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    o_MK = tl.zeros((M, KP), tl.float32)
    for left in range(tl.load(start + top) // N * N, tl.minimum(top + M, end), N):
        cols = left + tl.arange(0, N)
        col_ok = cols < T
        k_NK = rows_of(k, b, cols, col_ok, g, T, G, K, KP)
        v_NK = rows_of(v, b, cols, col_ok, g, T, G, K, KP)
        selected_MN = selection(words, b, rows, row_ok, left, T, X, N)
        s_MN = logits_of(q_MK, k_NK, selected_MN, scale)
        larger = tl.maximum(largest, tl.max(s_MN, 1))
        # -inf - -inf is NaN: a query without keys so far uses 0.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        p_MN = tl.exp2(s_MN - base[:, None])
        decay = tl.exp2(largest - base)
        total = total * decay + tl.sum(p_MN, 1)
        o_MK = o_MK * decay[:, None] + tl.dot(p_MN.to(v_NK.dtype), v_NK)
        largest = larger
    o_MK = o_MK / total[:, None]
    d = tl.arange(0, KP)
    at = ((b * T + rows.to(tl.int64)) * H + h) * K
    tl.store(
        o + at[:, None] + d[None, :],
        o_MK.to(o.dtype.element_ty),
        mask=row_ok[:, None] & (d < K)[None, :],
    )
    tl.store(lse + (b * H + h) * T + rows, largest + tl.log2(total), mask=row_ok)


@jit_of_block
def _dq_kernel(
    q,
    k,
    v,
    words,
    start,
    o,
    lse,
    delta,
    do,
    dq,
    scale,
    dq_scale,
    T,
    H,
    G,
    X,
    K: tl.constexpr,
    KP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    g = h // (H // G)
    top = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the longest first
    rows = top + tl.arange(0, M)
    row_ok = rows < T
    q_MK = rows_of(q, b, rows, row_ok, h, T, H, K, KP)
    do_MK = rows_of(do, b, rows, row_ok, h, T, H, K, KP)
    lse_M = tl.load(lse + (b * H + h) * T + rows, mask=row_ok, other=0.0)
    o_MK = rows_of(o, b, rows, row_ok, h, T, H, K, KP)
    delta_M = tl.sum(o_MK.to(tl.float32) * do_MK.to(tl.float32), 1)
    tl.store(delta + (b * H + h) * T + rows, delta_M, mask=row_ok)  # for _dkv_kernel
    dq_MK = tl.zeros((M, KP), tl.float32)
    for left in range(tl.load(start + top) // N * N, tl.minimum(top + M, T), N):
        cols = left + tl.arange(0, N)
        col_ok = cols < T
        k_NK = rows_of(k, b, cols, col_ok, g, T, G, K, KP)
        v_NK = rows_of(v, b, cols, col_ok, g, T, G, K, KP)
        selected_MN = selection(words, b, rows, row_ok, left, T, X, N)
        s_MN = logits_of(q_MK, k_NK, selected_MN, scale)
        p_MN = tl.exp2(s_MN - lse_M[:, None])
        dp_MN = tl.dot(do_MK, tl.trans(v_NK))
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_MK += tl.dot(ds_MN.to(k_NK.dtype), k_NK)
    d = tl.arange(0, KP)
    at = ((b * T + rows.to(tl.int64)) * H + h) * K
    tl.store(
        dq + at[:, None] + d[None, :],
        (dq_MK * dq_scale).to(dq.dtype.element_ty),
        mask=row_ok[:, None] & (d < K)[None, :],
    )


@jit_of_block
def _dkv_kernel(
    q,
    k,
    v,
    words,
    stop,
    lse,
    delta,
    do,
    dk,
    dv,
    scale,
    dk_scale,
    T,
    H,
    G,
    X,
    K: tl.constexpr,
    KP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    g = h // (H // G)
    left = tl.program_id(0) * N
    cols = left + tl.arange(0, N)
    col_ok = cols < T
    k_NK = rows_of(k, b, cols, col_ok, g, T, G, K, KP)
    v_NK = rows_of(v, b, cols, col_ok, g, T, G, K, KP)
    dk_NK = tl.zeros((N, KP), tl.float32)
    dv_NK = tl.zeros((N, KP), tl.float32)
    for top in range(left // M * M, tl.load(stop + tl.minimum(left + N, T) - 1), M):
        rows = top + tl.arange(0, M)
        row_ok = rows < T
        q_MK = rows_of(q, b, rows, row_ok, h, T, H, K, KP)
        do_MK = rows_of(do, b, rows, row_ok, h, T, H, K, KP)
        lse_M = tl.load(lse + (b * H + h) * T + rows, mask=row_ok, other=0.0)
        delta_M = tl.load(delta + (b * H + h) * T + rows, mask=row_ok, other=0.0)
        s_MN = logits_of(q_MK, k_NK, selection(words, b, rows, row_ok, left, T, X, N), scale)
        p_MN = tl.exp2(s_MN - lse_M[:, None])
        dv_NK += tl.dot(tl.trans(p_MN.to(do_MK.dtype)), do_MK)
        dp_MN = tl.dot(do_MK, tl.trans(v_NK))
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dk_NK += tl.dot(tl.trans(ds_MN.to(q_MK.dtype)), q_MK)
    d = tl.arange(0, KP)
    at = ((b * T + cols.to(tl.int64)) * H + h) * K
    ok = col_ok[:, None] & (d < K)[None, :]
    tl.store(dk + at[:, None] + d[None, :], (dk_NK * dk_scale).to(dk.dtype.element_ty), mask=ok)
    tl.store(dv + at[:, None] + d[None, :], dv_NK.to(dv.dtype.element_ty), mask=ok)
