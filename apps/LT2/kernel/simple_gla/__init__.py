"""Linear attention with one decay per head.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

g is constant in RetNet (https://arxiv.org/abs/2307.08621) and depends on the token in Mamba-2
(https://arxiv.org/abs/2405.21060). Shapes: B batch, T tokens, N sequences, H heads, G groups of
heads that share q and k, K key and V value head dim; S is stored K x V.
"""

from __future__ import annotations

from torch import Tensor

from apps.LT2.kernel.arguments import check_arguments, choose_impl
from apps.LT2.kernel.gla import gla_step
from apps.LT2.kernel.simple_gla.chunked import simple_gla_chunked
from apps.LT2.kernel.simple_gla.fla import OPERATOR
from apps.LT2.kernel.simple_gla.naive import simple_gla_naive
from lingua.transformer import repeat_kv

IMPLS = {"naive": simple_gla_naive, "chunked": simple_gla_chunked, "fla": OPERATOR.run}


def simple_gla(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run all tokens of B sequences, or of the N documents packed into one row.

    q, k        (B, T, G, K)   G divides H; head h uses q and k of group h G // H
    v           (B, T, H, V)
    g           (B, T, H)      log decay, <= 0, fp32; or (H,), the same for all tokens
    scale                      the kernels multiply q by it; K**-0.5 if None
    state       (N, H, K, V)   fp32 state before the first token, zeros if None; not changed
    cu_seqlens  (N + 1,)       int32 offsets of packed documents; then B is 1. None: N is B
    impl                       "naive", "chunked", "fla", or "auto": fla for 16-bit CUDA tensors
    Returns o (B, T, H, V) in v's dtype and the fp32 state (N, H, K, V) after the last token. Both
    are differentiable in q, k, v, state and g (B, T, H); a constant g must not require a gradient.
    """
    B, T, H, _ = v_BTHV.shape
    assert g.ndim > 1 or not g.requires_grad, "a constant decay takes no gradient"
    by_head = {"g": g.expand(B, T, H) if g.ndim == 1 else g}
    check_arguments(q_BTGK, k_BTGK, v_BTHV, state, cu_seqlens, by_head=by_head, grouped=True)
    compute = choose_impl(impl, IMPLS, v_BTHV)
    scale = float(q_BTGK.shape[-1] ** -0.5 if scale is None else scale)
    return compute(q_BTGK, k_BTGK, v_BTHV, g, scale=scale, state=state, cu_seqlens=cu_seqlens)


def simple_gla_step(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    g: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Run one token of every sequence and update `state_BHKV` (fp32) in place; returns o (B, H, V).

    g is (B, H) or (H,). q is multiplied by `scale`, K**-0.5 if None.
    """
    B, H, _ = v_BHV.shape
    q_BHK, k_BHK = (repeat_kv(x, H // x.shape[1], dim=1) for x in (q_BGK, k_BGK))
    g_BH1 = g.expand(B, H)[..., None]
    return gla_step(q_BHK, k_BHK, v_BHV, g_BH1, state_BHKV, scale=scale)
