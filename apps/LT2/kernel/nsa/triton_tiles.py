"""Tiles of the kernels: rows of queries and heads, and their loads.

A tile holds Q adjacent queries with all R query heads of one key/value head, padded to RP: M = Q RP
rows, which share the keys and values that a program loads. So a group of 16 heads fills the 64 rows
of a tensor core's tile with four queries.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from dataclasses import dataclass

from apps.LT2.kernel.triton_jit import jit, tl, triton

LOG2_E = 1.4426950408889634
MAX_QUERIES = 16  # of a tile: one bit for each in an entry of its list of blocks

# No specialization on numbers that change with the documents: it would compile new kernels.
jit_of_range = jit(do_not_specialize=["begin", "end", "C"])

# padded head dim -> (rows, keys, warps, stages)
TILES = {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)}


@dataclass(frozen=True)
class Tile:
    """The sizes of a tile for a head dim, a group of query heads, and a number of keys."""

    head_dim: int
    group: int
    n_keys: int  # a tile has fewer keys if fewer exist

    @property
    def row(self) -> dict[str, int]:
        """Return the constants of a row's load."""
        return {"K": self.head_dim, "KP": at_least_16(self.head_dim)}

    @property
    def options(self) -> dict[str, int]:
        """Return the constants of a tile of queries and their heads."""
        return {**self.row, "R": self.group, "RP": self.padded_group, "Q": self.queries, **self.key}

    @property
    def key(self) -> dict[str, int]:
        """Return the keys of a tile, and how the kernel runs."""
        _, keys, warps, stages = self._sizes
        keys = min(keys, at_least_16(self.n_keys))
        return {"N": keys, "num_warps": warps, "num_stages": stages}

    @property
    def rows(self) -> int:
        return self._sizes[0]

    @property
    def padded_group(self) -> int:
        return triton.next_power_of_2(self.group)

    @property
    def queries(self) -> int:
        return max(1, min(MAX_QUERIES, self.rows // self.padded_group))

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        return TILES[min(dim for dim in TILES if dim >= self.row["KP"])]


def at_least_16(n: int) -> int:
    """Return the next power of two that a dimension of a matrix product may have."""
    return max(16, triton.next_power_of_2(n))


# ---- in kernels


@jit()
def rows_of_tile(top, b, g, end, T, G, R: tl.constexpr, RP: tl.constexpr, Q: tl.constexpr):
    """Return the query of each row of a tile, its row in (B, T, H), and whether it exists."""
    r = tl.arange(0, Q * RP)
    query_M, head_M = top + r // RP, r % RP
    at_M = ((b * T + query_M.to(tl.int64)) * G + g) * R + head_M
    return query_M, at_M, (query_M < end) & (head_M < R)


@jit()
def load_rows(x, at_M, ok_M, K: tl.constexpr, KP: tl.constexpr):
    """Load rows of x (.., K) as (M, KP); zeros beyond K or if not ok."""
    d = tl.arange(0, KP)
    at_MK = at_M.to(tl.int64)[:, None] * K + d[None, :]
    return tl.load(x + at_MK, mask=ok_M[:, None] & (d < K)[None, :], other=0.0)


@jit()
def store_rows(x, value_MK, at_M, ok_M, K: tl.constexpr, KP: tl.constexpr):
    """Store (M, KP) in rows of x (.., K), in its dtype."""
    d = tl.arange(0, KP)
    at_MK = at_M.to(tl.int64)[:, None] * K + d[None, :]
    ok_MK = ok_M[:, None] & (d < K)[None, :]
    tl.store(x + at_MK, value_MK.to(x.dtype.element_ty), mask=ok_MK)


@jit()
def logits_of(q_MK, k_NK, visible_MN, scale):
    """Return scaled products of queries and keys, -inf for hidden keys."""
    return tl.where(visible_MN, tl.dot(q_MK, tl.trans(k_NK)) * scale, float("-inf"))


@jit()
def attend_more(s_MN, v_NK, largest_M, total_M, o_MK):
    """Add keys with logits s in base 2 to a softmax: its maximum, sum, and output."""
    larger_M = tl.maximum(largest_M, tl.max(s_MN, 1))
    # -inf - -inf is NaN: a query without keys so far uses 0.
    base_M = tl.where(larger_M == float("-inf"), 0.0, larger_M)
    p_MN = tl.exp2(s_MN - base_M[:, None])
    decay_M = tl.exp2(largest_M - base_M)
    total_M = total_M * decay_M + tl.sum(p_MN, 1)
    o_MK = o_MK * decay_M[:, None] + tl.dot(p_MN.to(v_NK.dtype), v_NK)
    return larger_M, total_M, o_MK


@jit()
def dq_more(s_MN, lse_M, delta_M, do_MK, k_NK, v_NK, dq_MK):
    """Add the gradient of queries from keys with logits s."""
    p_MN = tl.exp2(s_MN - lse_M[:, None])
    ds_MN = p_MN * (tl.dot(do_MK, tl.trans(v_NK)) - delta_M[:, None])
    return dq_MK + tl.dot(ds_MN.to(k_NK.dtype), k_NK)


@jit()
def dkv_more(q_MK, k_NK, v_NK, do_MK, visible_NM, lse_M, delta_M, scale, dk_NK, dv_NK):
    """Add the gradients of keys and values from M queries.

    The products have keys as rows, so no matrix of probabilities is transposed.
    """
    s_NM = tl.where(visible_NM, tl.dot(k_NK, tl.trans(q_MK)) * scale, float("-inf"))
    p_NM = tl.exp2(s_NM - lse_M[None, :])
    dv_NK += tl.dot(p_NM.to(do_MK.dtype), do_MK)
    ds_NM = p_NM * (tl.dot(v_NK, tl.trans(do_MK)) - delta_M[None, :])
    dk_NK += tl.dot(ds_NM.to(q_MK.dtype), q_MK)
    return dk_NK, dv_NK
