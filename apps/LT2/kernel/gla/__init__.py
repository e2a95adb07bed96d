"""Gated linear attention (https://arxiv.org/abs/2312.06635).

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

Shapes: B batch, T tokens, N sequences, H heads, K key and V value head dim; S is stored K x V.
"""

from __future__ import annotations

from torch import Tensor

from apps.LT2.kernel.arguments import check_arguments, choose_impl
from apps.LT2.kernel.gla.chunked import gla_chunked
from apps.LT2.kernel.gla.fla import OPERATOR
from apps.LT2.kernel.gla.naive import gla_naive
from apps.LT2.kernel.recurrent_step import recurrent_step

IMPLS = {"naive": gla_naive, "chunked": gla_chunked, "fla": OPERATOR.run}


def gla(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run all tokens of B sequences, or of the N documents packed into one row.

    q, k        (B, T, H, K)
    v           (B, T, H, V)
    g           (B, T, H, K)   log decay of each key channel, <= 0, fp32
    scale                      the kernels multiply q by it; K**-0.5 if None
    state       (N, H, K, V)   fp32 state before the first token, zeros if None; not changed
    cu_seqlens  (N + 1,)       int32 offsets of packed documents; then B is 1. None: N is B
    impl                       "naive", "chunked", "fla", or "auto": fla for 16-bit CUDA tensors
    Returns o (B, T, H, V) in v's dtype and the fp32 state (N, H, K, V) after the last token. Both
    are differentiable in q, k, v, g and state.
    """
    check_arguments(q_BTHK, k_BTHK, v_BTHV, state, cu_seqlens, by_channel={"g": g_BTHK})
    compute = choose_impl(impl, IMPLS, v_BTHV)
    scale = float(q_BTHK.shape[-1] ** -0.5 if scale is None else scale)
    return compute(q_BTHK, k_BTHK, v_BTHV, g_BTHK, scale=scale, state=state, cu_seqlens=cu_seqlens)


def gla_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g_BHK: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Run one token of every sequence and update `state_BHKV` (fp32) in place; returns o (B, H, V).

    g may be (B, H, 1): one decay per head. q is multiplied by `scale`, K**-0.5 if None.
    """
    return recurrent_step(q_BHK, k_BHK, v_BHV, g_BHK, None, state_BHKV, scale=scale)
