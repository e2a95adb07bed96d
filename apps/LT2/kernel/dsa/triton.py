"""Sparse attention on CUDA: Triton kernels that read which keys are selected from a bit mask.

Flash attention (https://arxiv.org/abs/2307.08691) with one bit for each query and key: no
probability is written to memory but their mean over heads, which the indexer learns from, for one
block of queries at a time. Unselected keys are masked, not skipped: a tile of 64 queries by 64 keys
seldom has none selected. No atomics, so results repeat to the bit.

Shapes: B batch, T tokens, H query heads, G key/value heads, K head width (KP: the next power of 2),
X bytes of a row of the mask; a tile is M queries by N keys. Exponents are of 2.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apps.LT2.kernel.documents import document_of_tokens
from apps.LT2.kernel.dsa.blocks import Block
from apps.LT2.kernel.triton_jit import jit, tl, triton

# Where a block begins and ends must not make kernels of its own.
_jit = jit(do_not_specialize=["begin", "end", "first", "last"])

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Documents:
    """Between which tokens there can be attention at all, (T,) int32: a token's document begins at
    `start` and ends before `stop`."""

    start_T: Tensor
    stop_T: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor | None, n_tokens: int, device: torch.device) -> Documents:
        if cu_seqlens is None:
            start = torch.zeros(n_tokens, dtype=torch.int32, device=device)
            return Documents(start, torch.full_like(start, n_tokens))
        document, _ = document_of_tokens(cu_seqlens, n_tokens)
        bounds = cu_seqlens.int()
        return Documents(bounds[document].contiguous(), bounds[document + 1].contiguous())


class KernelAttention:
    """Attention over the keys that `bits` (B, T, X) selects, filled block by block; S is T.

    A block's bits are to be set before it is attended to. All tensors are contiguous.
    """

    def __init__(
        self,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        bits_BTX: Tensor,
        cu_seqlens: Tensor | None,
    ):
        B, T, H, K = q_BTHK.shape
        self.inputs = tuple(x.contiguous() for x in (q_BTHK, k_BTGK, v_BTGK))
        self.bits_BTX, self.documents = bits_BTX, Documents.of(cu_seqlens, T, q_BTHK.device)
        self.o_BTHK = torch.empty(B, T, H, K, dtype=q_BTHK.dtype, device=q_BTHK.device)
        # log2 of the sum of 2 ** logit, for each query and head
        self.lse_BHT = torch.empty(B, H, T, dtype=torch.float32, device=q_BTHK.device)
        self.sizes = (T, H, k_BTGK.shape[2], bits_BTX.shape[-1])
        self.scale, self.tile = K**-0.5 * LOG2_E, {"K": K, **_tile(K)}

    def attend(self, block: Block, selected_BQS: Tensor, *, with_mean: bool) -> Tensor | None:
        """Compute a block's outputs; the mean of the heads' probabilities (B, Q, S), if wanted."""
        B, T, H, _ = self.o_BTHK.shape
        n_queries, n_keys = block.end - block.begin, block.n_keys
        n_tiles = triton.cdiv(n_queries, self.tile["M"])
        q_BTHK, k_BTGK, v_BTGK = self.inputs
        _attend_kernel[n_tiles, B * H](
            q_BTHK,
            k_BTGK,
            v_BTGK,
            self.bits_BTX,
            self.documents.start_T,
            self.o_BTHK,
            self.lse_BHT,
            self.scale,
            block.begin,
            block.end,
            *self.sizes,
            **self.tile,
        )
        if not with_mean:
            return None
        mean_BQS = self.lse_BHT.new_empty(B, n_queries, n_keys)
        _mean_kernel[triton.cdiv(n_keys, self.tile["N"]), n_tiles, B](
            q_BTHK,
            k_BTGK,
            self.bits_BTX,
            self.lse_BHT,
            mean_BQS,
            self.scale,
            block.begin,
            block.end,
            block.first,
            block.last,
            *self.sizes,
            **self.tile,
        )
        return mean_BQS

    def results(self) -> tuple[Tensor, Tensor]:
        """o, and the logarithms that `differentiate` needs."""
        return self.o_BTHK, self.lse_BHT


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
    """Gradients of q, k and v."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q_BTHK, k_BTGK, v_BTGK, do_BTHK = (x.contiguous() for x in (q_BTHK, k_BTGK, v_BTGK, do_BTHK))
    documents = Documents.of(cu_seqlens, T, q_BTHK.device)
    delta_BHT = (o_BTHK.float() * do_BTHK.float()).sum(-1).transpose(1, 2).contiguous()
    dq, dk, dv = (torch.empty_like(x) for x in (q_BTHK, k_BTGK, v_BTGK))
    tile, scale = _tile(K), K**-0.5
    inputs = (q_BTHK, k_BTGK, v_BTGK, bits_BTX)
    rest = (lse_BHT, delta_BHT, do_BTHK)
    sizes = (scale * LOG2_E, scale, T, H, G, bits_BTX.shape[-1])
    grid = (triton.cdiv(T, tile["M"]), B * H)
    _dq_kernel[grid](*inputs, documents.start_T, *rest, dq, *sizes, K=K, **tile)
    grid = (triton.cdiv(T, tile["N"]), B * G)
    _dkv_kernel[grid](*inputs, documents.stop_T, *rest, dk, dv, *sizes, K=K, **tile)
    return dq, dk, dv


def _tile(head_dim: int) -> dict[str, int]:
    width = max(16, triton.next_power_of_2(head_dim))
    if width > 128:
        return {"KP": width, "M": 32, "N": 32, "num_warps": 4, "num_stages": 2}
    warps = 8 if width == 128 else 4
    return {"KP": width, "M": 64, "N": 64, "num_warps": warps, "num_stages": 2}


# ---- kernels


@_jit
def _rows(x, b, tokens, ok, h, T, H, K: tl.constexpr, KP: tl.constexpr):
    """Rows (len(tokens), KP) of head h of x (B, T, H, K); zeros beyond K and where not ok."""
    d = tl.arange(0, KP)
    at = ((b * T + tokens.to(tl.int64)) * H + h) * K
    return tl.load(x + at[:, None] + d[None, :], mask=ok[:, None] & (d < K)[None, :], other=0.0)


@_jit
def _logits(q_MK, k_NK, bits, b, rows, row_ok, cols, col_ok, scale, T, X):
    """Scaled products of queries and keys, -inf where the key is not selected."""
    at = (b * T + rows.to(tl.int64)) * X
    byte = tl.load(
        bits + at[:, None] + (cols // 8)[None, :],
        mask=row_ok[:, None] & col_ok[None, :],
        other=0,
    )
    selected = ((byte.to(tl.int32) >> (cols % 8)[None, :]) & 1) != 0
    return tl.where(selected, tl.dot(q_MK, tl.trans(k_NK)) * scale, float("-inf"))


@_jit
def _attend_kernel(
    q,
    k,
    v,
    bits,
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
    top = begin + tl.program_id(0) * M
    rows = top + tl.arange(0, M)
    row_ok = rows < end
    q_MK = _rows(q, b, rows, row_ok, h, T, H, K, KP)
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    o_MK = tl.zeros((M, KP), tl.float32)
    for left in range(tl.load(start + top) // N * N, tl.minimum(top + M, end), N):
        cols = left + tl.arange(0, N)
        col_ok = cols < T
        k_NK = _rows(k, b, cols, col_ok, g, T, G, K, KP)
        v_NK = _rows(v, b, cols, col_ok, g, T, G, K, KP)
        s_MN = _logits(q_MK, k_NK, bits, b, rows, row_ok, cols, col_ok, scale, T, X)
        larger = tl.maximum(largest, tl.max(s_MN, 1))
        # -inf minus -inf is no number: a query of which no key was met yet takes 0 instead.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        p_MN = tl.exp2(s_MN - base[:, None])
        fade = tl.exp2(largest - base)
        total = total * fade + tl.sum(p_MN, 1)
        o_MK = o_MK * fade[:, None] + tl.dot(p_MN.to(v_NK.dtype), v_NK)
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


@_jit
def _mean_kernel(
    q,
    k,
    bits,
    lse,
    mean,
    scale,
    begin,
    end,
    first,
    last,
    T,
    H,
    G,
    X,
    K: tl.constexpr,
    KP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    top, left = begin + tl.program_id(1) * M, first + tl.program_id(0) * N
    rows, cols = top + tl.arange(0, M), left + tl.arange(0, N)
    row_ok, col_ok = rows < end, cols < last
    sum_MN = tl.zeros((M, N), tl.float32)
    n_heads = tl.where(left < top + M, H, 0)  # nothing to add where all keys lie in the future
    for h in range(0, n_heads):
        q_MK = _rows(q, b, rows, row_ok, h, T, H, K, KP)
        k_NK = _rows(k, b, cols, col_ok, h // (H // G), T, G, K, KP)
        s_MN = _logits(q_MK, k_NK, bits, b, rows, row_ok, cols, col_ok, scale, T, X)
        lse_M = tl.load(lse + (b * H + h) * T + rows, mask=row_ok, other=0.0)
        sum_MN += tl.exp2(s_MN - lse_M[:, None])
    at = (b * (end - begin) + (rows - begin)) * (last - first)
    tl.store(
        mean + at[:, None] + (cols - first)[None, :],
        sum_MN / H,
        mask=row_ok[:, None] & col_ok[None, :],
    )


@_jit
def _dq_kernel(
    q,
    k,
    v,
    bits,
    start,
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
    top = tl.program_id(0) * M
    rows = top + tl.arange(0, M)
    row_ok = rows < T
    q_MK = _rows(q, b, rows, row_ok, h, T, H, K, KP)
    do_MK = _rows(do, b, rows, row_ok, h, T, H, K, KP)
    lse_M = tl.load(lse + (b * H + h) * T + rows, mask=row_ok, other=0.0)
    delta_M = tl.load(delta + (b * H + h) * T + rows, mask=row_ok, other=0.0)
    dq_MK = tl.zeros((M, KP), tl.float32)
    for left in range(tl.load(start + top) // N * N, tl.minimum(top + M, T), N):
        cols = left + tl.arange(0, N)
        col_ok = cols < T
        k_NK = _rows(k, b, cols, col_ok, g, T, G, K, KP)
        v_NK = _rows(v, b, cols, col_ok, g, T, G, K, KP)
        s_MN = _logits(q_MK, k_NK, bits, b, rows, row_ok, cols, col_ok, scale, T, X)
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


@_jit
def _dkv_kernel(
    q,
    k,
    v,
    bits,
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
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    left = tl.program_id(0) * N
    cols = left + tl.arange(0, N)
    col_ok = cols < T
    k_NK = _rows(k, b, cols, col_ok, g, T, G, K, KP)
    v_NK = _rows(v, b, cols, col_ok, g, T, G, K, KP)
    dk_NK = tl.zeros((N, KP), tl.float32)
    dv_NK = tl.zeros((N, KP), tl.float32)
    last_seen = tl.load(stop + tl.minimum(left + N, T) - 1)
    for h in range(g * (H // G), (g + 1) * (H // G)):
        for top in range(left // M * M, last_seen, M):
            rows = top + tl.arange(0, M)
            row_ok = rows < T
            q_MK = _rows(q, b, rows, row_ok, h, T, H, K, KP)
            do_MK = _rows(do, b, rows, row_ok, h, T, H, K, KP)
            lse_M = tl.load(lse + (b * H + h) * T + rows, mask=row_ok, other=0.0)
            delta_M = tl.load(delta + (b * H + h) * T + rows, mask=row_ok, other=0.0)
            s_MN = _logits(q_MK, k_NK, bits, b, rows, row_ok, cols, col_ok, scale, T, X)
            p_MN = tl.exp2(s_MN - lse_M[:, None])
            dv_NK += tl.dot(tl.trans(p_MN.to(do_MK.dtype)), do_MK)
            dp_MN = tl.dot(do_MK, tl.trans(v_NK))
            ds_MN = p_MN * (dp_MN - delta_M[:, None])
            dk_NK += tl.dot(tl.trans(ds_MN.to(q_MK.dtype)), q_MK)
    d = tl.arange(0, KP)
    at = ((b * T + cols.to(tl.int64)) * G + g) * K
    ok = col_ok[:, None] & (d < K)[None, :]
    tl.store(dk + at[:, None] + d[None, :], (dk_NK * dk_scale).to(dk.dtype.element_ty), mask=ok)
    tl.store(dv + at[:, None] + d[None, :], dv_NK.to(dv.dtype.element_ty), mask=ok)
