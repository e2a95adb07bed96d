"""The lightning indexer on CUDA: scores, choice of keys, loss and gradients.

A block of Q queries has one matrix, (B, Q, S) in fp32: first the scores, then the loss's gradient
in their place. Each kernel recomputes the products of the index heads. No atomics, so results
repeat to the bit.

Shapes: B batch, T tokens, H query heads, G key/value heads, K head dim, J index heads, C index dim
(KP, CP: the next powers of 2), X bytes of a row of the mask, S = `end` keys for a block of queries
begin..end; a tile is M queries by N keys.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.dsa.selection import Index, pack_bits, select_top_k
from apps.LT2.kernel.dsa.triton import (
    KernelAttention,
    jit_of_block,
    logits_of,
    padded_dim,
    rows_of,
    selection,
)
from apps.LT2.kernel.triton_jit import jit, tl, triton

MAX_CHOICE = 2**15  # keys per program of _select_kernel, whose scores are in registers
KEYS_OF_WARP = 1024  # 32 per thread


class KernelIndexer:
    """Selects the keys of `attention` and trains on it; S is T.

    For each block call `choose`, `attention.attend`, `compare` and `differentiate`, in this order.
    """

    def __init__(self, index: Index, attention: KernelAttention, top_k: int, *, with_loss: bool):
        self.index = Index(*(x.contiguous() for x in index))
        self.attention, self.documents = attention, attention.documents
        self.bits_BTX, self.top_k = attention.bits_BTX, top_k
        self.padded_dim = padded_dim(index.k_BSC.shape[-1])
        # The same for all kernels: tiles without visible keys are neither written nor read.
        size = 64 if max(self.padded_dim, attention.padded_dim) <= 128 else 32
        self.tile = {"M": size, "N": size, "num_warps": 4, "num_stages": 2}
        self.losses: list[Tensor] = []
        self.grads: list[Tensor] = []
        if with_loss:
            q, k, w = self.index
            self.grads = [torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32)]
            self.grads.append(torch.empty_like(w))

    def choose(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Set the block's bits. Returns its scores (B, Q, S) and their log-sum-exp (B, Q).

        The log-sum-exp is over selected keys. Tiles without visible keys hold undefined scores.
        """
        q, k, w = self.index
        (B, T, J, C), start = q.shape, self.documents.start_T
        scores = torch.empty(B, end - begin, end, dtype=torch.float32, device=q.device)
        _score_kernel[self._tiles(begin, end)](
            q, k, w, scores, start, begin, end, T, J, C=C, CP=self.padded_dim, **self.tile
        )
        if end > MAX_CHOICE:
            return scores, self._choose_in_torch(scores, begin, end)
        log_sum = scores.new_empty(B, end - begin)
        n_bytes = max(16, triton.next_power_of_2(triton.cdiv(end, 8)))
        _select_kernel[end - begin, B](
            scores,
            self.bits_BTX,
            log_sum,
            start,
            begin,
            end,
            T,
            self.bits_BTX.shape[-1],
            self.top_k,
            BYTES=n_bytes,
            KEYS_LOG2=(8 * n_bytes).bit_length() - 1,
            num_warps=max(1, 8 * n_bytes // KEYS_OF_WARP),
        )
        return scores, log_sum

    def _choose_in_torch(self, scores_BQS: Tensor, begin: int, end: int) -> Tensor:
        key = torch.arange(end, device=scores_BQS.device)
        visible = key <= key[begin:, None]
        visible &= key >= self.documents.start_T[begin:end, None]
        selected = select_top_k(scores_BQS, visible, self.top_k)
        bits = pack_bits(selected)
        self.bits_BTX[:, begin:end, : bits.shape[-1]] = bits
        return scores_BQS.masked_fill(~selected, float("-inf")).logsumexp(-1)

    def compare(self, scores: Tensor, log_sum: Tensor, begin: int, end: int) -> None:
        """Add to the loss, and overwrite the scores with their gradient."""
        attention, grid = self.attention, self._tiles(begin, end)
        q, k, _ = attention.inputs
        loss = scores.new_zeros(grid)
        _compare_kernel[grid](
            q,
            k,
            attention.words_BTX,
            self.documents.start_T,
            attention.lse_BHT,
            scores,
            log_sum,
            loss,
            attention.scale,
            begin,
            end,
            *attention.sizes,
            K=q.shape[3],
            KP=attention.padded_dim,
            **self.tile,
        )
        self.losses.append(loss.sum())

    def differentiate(self, dscores: Tensor, begin: int, end: int) -> None:
        """Write the gradients of the block's q and w; add to the gradient of k."""
        q, k, w = self.index
        B, T, J, C = q.shape
        dq, dk, dw = self.grads
        start, stop = self.documents.start_T, self.documents.stop_T
        options = {"C": C, "CP": self.padded_dim, **self.tile}
        n_keys, n_queries, _ = self._tiles(begin, end)
        _index_dq_kernel[n_queries, B * J](
            q, k, w, dscores, dq, dw, start, begin, end, T, J, **options
        )
        _index_dk_kernel[n_keys, B](q, k, w, dscores, dk, stop, begin, end, T, J, **options)

    def results(self) -> tuple[Tensor, list[Tensor]]:
        """Return the loss summed over queries, and its gradients for q, k and w; 0, [] without."""
        q, k, _ = self.index
        if not self.losses:
            return torch.zeros((), device=q.device), []
        dq, dk, dw = self.grads
        return torch.stack(self.losses).sum(), [dq, dk.to(k.dtype), dw]

    def _tiles(self, begin: int, end: int) -> tuple[int, int, int]:
        """Return the numbers of key tiles, query tiles and sequences."""
        m, n = self.tile["M"], self.tile["N"]
        return triton.cdiv(end, n), triton.cdiv(end - begin, m), len(self.index.k_BSC)


# ---- kernels


@jit()
def _is_seen(start, top, left, M: tl.constexpr, N: tl.constexpr):
    """Return whether any of M queries from `top` sees any of N keys from `left`."""
    return (left < top + M) & (left + N > tl.load(start + top))


@jit()
def _place(b, rows, cols, begin, end):
    """Return the offsets of (M, N) queries and keys in a block's matrix."""
    row = b * (end - begin) + (rows - begin)
    return row.to(tl.int64)[:, None] * end + cols[None, :]


@jit()
def _of_index_head(w, b, rows, row_ok, j, T, J):
    """Load the (M,) weights of index head j."""
    return tl.load(w + (b * T + rows.to(tl.int64)) * J + j, mask=row_ok, other=0.0)


@jit_of_block
def _score_kernel(
    q,
    k,
    w,
    scores,
    start,
    begin,
    end,
    T,
    J,
    C: tl.constexpr,
    CP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b = tl.program_id(2)
    top, left = begin + tl.program_id(1) * M, tl.program_id(0) * N
    rows, cols = top + tl.arange(0, M), left + tl.arange(0, N)
    row_ok, col_ok = rows < end, cols < end
    k_NC = rows_of(k, b, cols, col_ok, 0, T, 1, C, CP)
    sum_MN = tl.zeros((M, N), tl.float32)
    n_heads = tl.where(_is_seen(start, top, left, M, N), J, 0)
    for j in range(0, n_heads):
        q_MC = rows_of(q, b, rows, row_ok, j, T, J, C, CP)
        heard_MN = tl.maximum(tl.dot(q_MC, tl.trans(k_NC)), 0.0)
        sum_MN += heard_MN * _of_index_head(w, b, rows, row_ok, j, T, J)[:, None]
    at = scores + _place(b, rows, cols, begin, end)
    tl.store(at, sum_MN, mask=row_ok[:, None] & col_ok[None, :] & (n_heads > 0))


@jit()
def _in_order(x):
    """Map fp32 to uint32 > 0 of the same order; both zeros map to one number."""
    i = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (i ^ ((i >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@jit()
def _from_order(order):
    i = order.to(tl.int32, bitcast=True)
    return tl.where(i < 0, i ^ -2147483648, ~i).to(tl.float32, bitcast=True)


@jit()
def _count(mask):
    return tl.sum(mask.to(tl.int32))  # over all axes at once: each thread first adds its own keys


@jit_of_block
def _select_kernel(
    scores,
    bits,
    log_sum,
    start,
    begin,
    end,
    T,
    X,
    top_k,
    BYTES: tl.constexpr,
    KEYS_LOG2: tl.constexpr,
):
    """Select the keys of one query, whose scores are in registers as ordered integers.

    The least selected score is found bit by bit from the highest: a bit is set if at least top_k
    scores reach the result. If too many keys have this score, the first selected of them is found
    in the same way.
    """
    row, b = begin + tl.program_id(0), tl.program_id(1)
    first = tl.load(start + row)
    byte, bit = tl.arange(0, BYTES), tl.arange(0, 8)
    key = byte[:, None] * 8 + bit[None, :]
    at = (b * (end - begin) + (row - begin)).to(tl.int64)
    seen = (key >= first) & (key <= row)
    order = tl.where(seen, _in_order(tl.load(scores + at * end + key, mask=seen, other=0.0)), 0)

    threshold = tl.full((), 0, tl.uint32)  # with at most top_k keys all are above it
    left = tl.where(row + 1 - first > top_k, 32, 0)
    while left > 0:
        left -= 1
        higher = threshold | (tl.full((), 1, tl.uint32) << left)
        count = _count(order >= higher)
        threshold = tl.where(count >= top_k, higher, threshold)
        if count == top_k:  # exactly these: put the threshold below them
            threshold -= 1
            left = 0

    room = top_k - _count(order > threshold)
    tied = (order == threshold) & (order > 0)
    earliest = 0
    if _count(tied) > room:
        for i in range(0, KEYS_LOG2):  # the last key from which more than `room` follow
            later = earliest + (1 << (KEYS_LOG2 - 1 - i))
            earliest = tl.where(_count(tied & (key >= later)) > room, later, earliest)
        earliest += 1
    selected = (order > threshold) | (tied & (key >= earliest))

    # The four quarters of the mask share one sum along the bits, which takes fewer shuffles.
    shift, quarters = 8 * tl.arange(0, 4), selected.to(tl.int32).reshape(4, BYTES // 4, 8)
    packed = tl.sum(tl.sum(quarters << (shift[:, None, None] + bit[None, None, :]), 0), 1)
    packed = (packed[None, :] >> shift[:, None]).reshape(BYTES)
    to = bits + (b * T + row).to(tl.int64) * X + byte
    tl.store(to, packed.to(tl.uint8), mask=byte < X)
    x = tl.where(selected, _from_order(order), float("-inf"))
    largest = tl.max(x)
    total = tl.sum(tl.exp(x - largest))
    tl.store(log_sum + at, largest + tl.log(total))


@jit_of_block
def _compare_kernel(
    q,
    k,
    words,
    start,
    lse,
    scores,
    log_sum,
    loss,
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
    """Compute a tile's KL and overwrite I by softmax(I) - p; p is the mean over query heads."""
    b = tl.program_id(2)
    top, left = begin + tl.program_id(1) * M, tl.program_id(0) * N
    if _is_seen(start, top, left, M, N):
        rows, cols = top + tl.arange(0, M), left + tl.arange(0, N)
        row_ok, col_ok = rows < end, cols < end
        selected_MN = selection(words, b, rows, row_ok, left, T, X, N)
        p_MN = tl.zeros((M, N), tl.float32)
        for h in range(0, H):
            q_MK = rows_of(q, b, rows, row_ok, h, T, H, K, KP)
            k_NK = rows_of(k, b, cols, col_ok, h // (H // G), T, G, K, KP)
            lse_M = tl.load(lse + (b * H + h) * T + rows, mask=row_ok, other=0.0)
            p_MN += tl.exp2(logits_of(q_MK, k_NK, selected_MN, scale) - lse_M[:, None])
        p_MN /= H
        at = scores + _place(b, rows, cols, begin, end)
        ok = row_ok[:, None] & col_ok[None, :]
        log_sum_M = tl.load(log_sum + b * (end - begin) + rows - begin, mask=row_ok, other=0.0)
        log_guess_MN = tl.load(at, mask=ok, other=0.0) - log_sum_M[:, None]
        guess_MN = tl.where(selected_MN, tl.exp(log_guess_MN), 0.0)
        tl.store(at, guess_MN - p_MN, mask=ok)
        kl_MN = tl.where(p_MN > 0, p_MN * (tl.log(p_MN) - log_guess_MN), 0.0)
        to = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + b
        tl.store(loss + to, tl.sum(tl.sum(kl_MN, 1), 0))


@jit_of_block
def _index_dq_kernel(
    q,
    k,
    w,
    dscores,
    dq,
    dw,
    start,
    begin,
    end,
    T,
    J,
    C: tl.constexpr,
    CP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b, j = tl.program_id(1) // J, tl.program_id(1) % J
    top = begin + (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the longest first
    rows = top + tl.arange(0, M)
    row_ok = rows < end
    q_MC = rows_of(q, b, rows, row_ok, j, T, J, C, CP)
    w_M = _of_index_head(w, b, rows, row_ok, j, T, J)
    dq_MC = tl.zeros((M, CP), tl.float32)
    dw_M = tl.zeros((M,), tl.float32)
    for left in range(tl.load(start + top) // N * N, tl.minimum(top + M, end), N):
        cols = left + tl.arange(0, N)
        col_ok = cols < end
        k_NC = rows_of(k, b, cols, col_ok, 0, T, 1, C, CP)
        at = dscores + _place(b, rows, cols, begin, end)
        d_MN = tl.load(at, mask=row_ok[:, None] & col_ok[None, :], other=0.0)
        heard_MN = tl.dot(q_MC, tl.trans(k_NC))
        d_MN = tl.where(heard_MN > 0, d_MN, 0.0)
        dw_M += tl.sum(d_MN * heard_MN, 1)
        dq_MC += tl.dot((d_MN * w_M[:, None]).to(k_NC.dtype), k_NC)
    c = tl.arange(0, CP)
    at_M = (b * T + rows.to(tl.int64)) * J + j
    ok = row_ok[:, None] & (c < C)[None, :]
    tl.store(dq + at_M[:, None] * C + c[None, :], dq_MC.to(dq.dtype.element_ty), mask=ok)
    tl.store(dw + at_M, dw_M, mask=row_ok)


@jit_of_block
def _index_dk_kernel(
    q,
    k,
    w,
    dscores,
    dk,
    stop,
    begin,
    end,
    T,
    J,
    C: tl.constexpr,
    CP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b = tl.program_id(1)
    left = tl.program_id(0) * N
    cols = left + tl.arange(0, N)
    col_ok = cols < end
    k_NC = rows_of(k, b, cols, col_ok, 0, T, 1, C, CP)
    c = tl.arange(0, CP)
    to = dk + (b * T + cols.to(tl.int64))[:, None] * C + c[None, :]
    ok = col_ok[:, None] & (c < C)[None, :]
    dk_NC = tl.load(to, mask=ok, other=0.0)  # of earlier blocks
    last_seen = tl.minimum(end, tl.load(stop + tl.minimum(left + N, end) - 1))
    for top in range(begin + tl.maximum(left - begin, 0) // M * M, last_seen, M):
        rows = top + tl.arange(0, M)
        row_ok = rows < end
        at = dscores + _place(b, rows, cols, begin, end)
        d_MN = tl.load(at, mask=row_ok[:, None] & col_ok[None, :], other=0.0)
        for j in range(0, J):
            q_MC = rows_of(q, b, rows, row_ok, j, T, J, C, CP)
            w_M = _of_index_head(w, b, rows, row_ok, j, T, J)
            heard_MN = tl.dot(q_MC, tl.trans(k_NC))
            dheard_MN = tl.where(heard_MN > 0, d_MN * w_M[:, None], 0.0).to(q_MC.dtype)
            dk_NC += tl.dot(tl.trans(dheard_MN), q_MC)
    tl.store(to, dk_NC, mask=ok)
