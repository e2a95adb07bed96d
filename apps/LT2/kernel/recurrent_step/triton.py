"""The decode step of a linear recurrence on CUDA: reads and writes each state once.

A program holds all key channels of a head and some of its value channels: columns of the state do
not depend on each other. Shapes as in `recurrent_step`.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from torch import Tensor

from apps.LT2.kernel.triton_jit import jit, tl, triton

STATE_TILE = 4096  # elements of the state per program: 32 registers per thread
MIN_COLUMNS = 8  # per tile: 32 bytes, one memory transaction


def launch(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g: Tensor | None,
    beta_BH: Tensor | None,
    state_BHKV: Tensor,
    scale: float,
) -> Tensor:
    B, H, K, V = state_BHKV.shape
    q_BHK, k_BHK, v_BHV = (_rows(x) for x in (q_BHK, k_BHK, v_BHV))
    g = None if g is None else _rows(g)
    o_BHV = v_BHV.new_empty(v_BHV.shape)
    block_K = triton.next_power_of_2(K)
    block_V = max(min(triton.next_power_of_2(V), STATE_TILE // block_K), MIN_COLUMNS)
    _step_kernel[(B * H, triton.cdiv(V, block_V))](
        q_BHK,
        k_BHK,
        v_BHV,
        g,
        beta_BH,
        state_BHKV,
        o_BHV,
        scale,
        H,
        *q_BHK.stride()[:2],
        *k_BHK.stride()[:2],
        *v_BHV.stride()[:2],
        *((0, 0) if g is None else g.stride()[:2]),
        *((0, 0) if beta_BH is None else beta_BH.stride()),
        K=K,
        V=V,
        BLOCK_K=block_K,
        BLOCK_V=block_V,
        DECAYS=g is not None,
        BY_CHANNEL=g is not None and g.shape[-1] == K,
        DELTA=beta_BH is not None,
        num_warps=4,
    )
    return o_BHV


def _rows(x: Tensor) -> Tensor:
    """Make the channels of a head contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@jit()
def _step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    beta_ptr,
    state_ptr,
    o_ptr,
    scale,
    H,
    q_B,
    q_H,
    k_B,
    k_H,
    v_B,
    v_H,
    g_B,
    g_H,
    beta_B,
    beta_H,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DECAYS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    DELTA: tl.constexpr,
):
    bh, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = bh // H, bh % H
    at_K, at_V = tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_K, in_V = at_K < K, at_V < V
    q = tl.load(q_ptr + b * q_B + h * q_H + at_K, mask=in_K, other=0.0).to(tl.float32) * scale
    k = tl.load(k_ptr + b * k_B + h * k_H + at_K, mask=in_K, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + b * v_B + h * v_H + at_V, mask=in_V, other=0.0).to(tl.float32)
    state_at = state_ptr + bh * K * V + at_K[:, None] * V + at_V[None, :]
    inside = in_K[:, None] & in_V[None, :]
    S = tl.load(state_at, mask=inside, other=0.0)
    if DECAYS:
        g_at = g_ptr + b * g_B + h * g_H
        if BY_CHANNEL:
            g = tl.load(g_at + at_K, mask=in_K, other=0.0).to(tl.float32)
            S = S * tl.exp(g)[:, None]
        else:
            S = S * tl.exp(tl.load(g_at).to(tl.float32))
    if DELTA:
        beta = tl.load(beta_ptr + b * beta_B + h * beta_H).to(tl.float32)
        v = (v - tl.sum(S * k[:, None], axis=0)) * beta
    S = S + k[:, None] * v[None, :]
    tl.store(state_at, S, mask=inside)
    o = tl.sum(S * q[:, None], axis=0)
    tl.store(o_ptr + bh * V + at_V, o.to(o_ptr.dtype.element_ty), mask=in_V)
