"""Gated delta rule (https://arxiv.org/abs/2412.06464): the only door to its implementations.

    S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t K^-0.5

Shapes: B batch, T tokens, N sequences, H heads, K key and V value width; S is stored K x V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.gated_delta_rule.chunked import gated_delta_rule_chunked
from apps.LT2.kernel.gated_delta_rule.fla import gated_delta_rule_fla
from apps.LT2.kernel.gated_delta_rule.naive import gated_delta_rule_naive

IMPLS = {
    "naive": gated_delta_rule_naive,
    "chunked": gated_delta_rule_chunked,
    "fla": gated_delta_rule_fla,
}


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
    """All tokens of B sequences, or of the N documents packed into one row.

    q, k        (B, T, H, K)   unit norm along K; q is multiplied by K**-0.5 here
    v           (B, T, H, V)
    g           (B, T, H)      log decay, <= 0, fp32
    beta        (B, T, H)      write strength, in (0, 2), fp32
    state       (N, H, K, V)   fp32 state before the first token, zeros if None; not changed
    cu_seqlens  (N + 1,)       int32 bounds of packed documents; then B is 1. None: N is B
    Returns o (B, T, H, V) in v's dtype and the fp32 state (N, H, K, V) after the last token.
    Differentiable in q, k, v, g, beta and state, through both results. `impl`: "auto" is fla's
    kernels for 16-bit CUDA tensors and the chunked torch form otherwise; "naive", "chunked" and
    "fla" force one.
    """
    _check_shapes(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state, cu_seqlens)
    if impl == "auto":
        impl = "fla" if v_BTHV.is_cuda and v_BTHV.dtype.itemsize == 2 else "chunked"
    assert impl in IMPLS, f"impl must be auto or one of {list(IMPLS)}, got {impl!r}"
    return IMPLS[impl](q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state=state, cu_seqlens=cu_seqlens)


@torch.no_grad()
def gated_delta_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g_BH: Tensor,
    beta_BH: Tensor,
    state_BHKV: Tensor,
) -> Tensor:
    """One token of every sequence: `state_BHKV` (fp32) is updated in place, o (B, H, V) returned.

    Decode is bound by the state's memory traffic, so q and k read the *old* state together; what
    this token writes reaches o through q.k alone: S_t^T q = exp(g) S^T q + (k.q) write.
    """
    dtype = v_BHV.dtype
    q_BHK, k_BHK, v_BHV = q_BHK.float() * q_BHK.shape[-1] ** -0.5, k_BHK.float(), v_BHV.float()
    keep_BH1 = g_BH.float().exp()[..., None]
    read_BH2V = torch.stack([q_BHK, k_BHK], dim=2) @ state_BHKV * keep_BH1[..., None]
    write_BHV = (v_BHV - read_BH2V[:, :, 1]) * beta_BH.float()[..., None]
    state_BHKV.mul_(keep_BH1[..., None]).addcmul_(k_BHK[..., None], write_BHV[:, :, None])
    qk_BH1 = (q_BHK * k_BHK).sum(-1, keepdim=True)
    return torch.addcmul(read_BH2V[:, :, 0], qk_BH1, write_BHV).to(dtype)


def _check_shapes(q, k, v, g, beta, state, cu_seqlens) -> None:
    B, T, H, K = q.shape
    assert T > 0, "no tokens"
    assert k.shape == q.shape, f"k {tuple(k.shape)} is not shaped as q {tuple(q.shape)}"
    assert v.shape[:3] == (B, T, H), f"v {tuple(v.shape)} does not go with q {tuple(q.shape)}"
    for name, x in (("g", g), ("beta", beta)):
        assert x.shape == (B, T, H), f"{name} {tuple(x.shape)} is not {(B, T, H)}"
        assert x.dtype.itemsize >= 4, f"{name} must be fp32, got {x.dtype}"
    assert cu_seqlens is None or B == 1, f"cu_seqlens packs documents into one row, got B = {B}"
    n = B if cu_seqlens is None else len(cu_seqlens) - 1
    if state is not None:
        want = (n, H, K, v.shape[-1])
        assert state.shape == want, f"state {tuple(state.shape)} is not {want}"
        assert state.dtype.itemsize >= 4, f"state must be fp32, got {state.dtype}"
