"""Gated delta rule (https://arxiv.org/abs/2412.06464).

    S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t K^-0.5

Shapes: B batch, T tokens, N sequences, H heads, K key and V value head dim; S is stored K x V.
"""

from __future__ import annotations

from torch import Tensor

from apps.LT2.kernel.arguments import check_arguments, choose_impl
from apps.LT2.kernel.delta import delta_rule_chunked
from apps.LT2.kernel.gated_delta_rule.fla import OPERATOR
from apps.LT2.kernel.gated_delta_rule.naive import gated_delta_rule_naive
from apps.LT2.kernel.recurrent_step import recurrent_step

IMPLS = {"naive": gated_delta_rule_naive, "chunked": delta_rule_chunked, "fla": OPERATOR.run}


def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run all tokens of B sequences, or of the N documents packed into one row.

    q, k        (B, T, H, K)   unit norm along K; the kernels multiply q by K**-0.5
    v           (B, T, H, V)
    g           (B, T, H)      log decay, <= 0, fp32
    beta        (B, T, H)      write strength, in (0, 2), fp32
    state       (N, H, K, V)   fp32 state before the first token, zeros if None; not changed
    cu_seqlens  (N + 1,)       int32 offsets of packed documents; then B is 1. None: N is B
    impl                       "naive", "chunked", "fla", or "auto": fla for 16-bit CUDA tensors
    Returns o (B, T, H, V) in v's dtype and the fp32 state (N, H, K, V) after the last token. Both
    are differentiable in q, k, v, g, beta and state.
    """
    by_head = {"g": g_BTH, "beta": beta_BTH}
    check_arguments(q_BTHK, k_BTHK, v_BTHV, state, cu_seqlens, by_head=by_head)
    compute = choose_impl(impl, IMPLS, v_BTHV)
    return compute(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state=state, cu_seqlens=cu_seqlens)


def gated_delta_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, g_BH: Tensor, beta_BH: Tensor, state_BHKV: Tensor
) -> Tensor:
    """Run one token of every sequence and update `state_BHKV` (fp32) in place; returns o (B, H, V).

    q is multiplied by K**-0.5.
    """
    return recurrent_step(q_BHK, k_BHK, v_BHV, g_BH[..., None], beta_BH, state_BHKV)
