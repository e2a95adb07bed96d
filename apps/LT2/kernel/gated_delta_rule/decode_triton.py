"""A decode step of Gated DeltaNet from the convolution to the output projection, in one kernel.

A program takes one head of one row: unit q and k, decay, delta rule, gated RMSNorm. It holds the
whole state, so each is read and written once. Shapes as in `gated_delta_layer_step`.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from torch import Tensor

from apps.LT2.kernel.triton_jit import jit, tl, triton

NUM_WARPS = 16  # a state of 96 x 192 takes 64 registers of each thread


def launch(
    streams_BC: Tensor,
    gate_BC: Tensor,
    a_BH: Tensor,
    b_BH: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    norm_V: Tensor,
    eps: float,
    neg_eigval: bool,
    state_BHKV: Tensor,
    *,
    early: bool,
) -> Tensor:
    B, H, K, V = state_BHKV.shape
    y_BC = gate_BC.new_empty(B, H * V)
    _layer_step_kernel[(B * H,)](
        streams_BC,
        gate_BC,
        a_BH,
        b_BH,
        A_log_H,
        dt_bias_H,
        norm_V,
        state_BHKV,
        y_BC,
        streams_BC.stride(0),
        gate_BC.stride(0),
        a_BH.stride(0),
        b_BH.stride(0),
        eps,
        K**-0.5,
        H,
        K=K,
        V=V,
        BLOCK_K=triton.next_power_of_2(K),
        BLOCK_V=triton.next_power_of_2(V),
        NEG_EIGVAL=neg_eigval,
        EARLY=early,
        num_warps=NUM_WARPS,
        **({"launch_pdl": True} if early else {}),
    )
    return y_BC


@jit()
def _layer_step_kernel(
    streams_ptr,
    gate_ptr,
    a_ptr,
    b_ptr,
    A_log_ptr,
    dt_bias_ptr,
    norm_ptr,
    state_ptr,
    y_ptr,
    streams_B,
    gate_B,
    a_B,
    b_B,
    eps,
    scale,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NEG_EIGVAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    at_K, at_V = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    in_K, in_V = at_K < K, at_V < V
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    state_at = state_ptr + bh * K * V + at_K[:, None] * V + at_V[None, :]
    inside = in_K[:, None] & in_V[None, :]
    S = tl.load(state_at, mask=inside, other=0.0)
    row = streams_ptr + b * streams_B
    q = tl.load(row + h * K + at_K, mask=in_K, other=0.0).to(tl.float32)
    k = tl.load(row + (H + h) * K + at_K, mask=in_K, other=0.0).to(tl.float32)
    v = tl.load(row + 2 * H * K + h * V + at_V, mask=in_V, other=0.0).to(tl.float32)
    # Rounded where the layer of plain torch rounds.
    dtype = y_ptr.dtype.element_ty
    q = (q * tl.rsqrt(tl.sum(q * q, axis=0) + 1e-6)).to(dtype).to(tl.float32) * scale
    k = (k * tl.rsqrt(tl.sum(k * k, axis=0) + 1e-6)).to(dtype).to(tl.float32)
    a = tl.load(a_ptr + b * a_B + h).to(tl.float32) + tl.load(dt_bias_ptr + h).to(tl.float32)
    softplus = tl.where(a > 20, a, tl.log(1 + tl.exp(a)))
    keep = tl.exp(-tl.exp(tl.load(A_log_ptr + h).to(tl.float32)) * softplus)
    beta = 1 / (1 + tl.exp(-tl.load(b_ptr + b * b_B + h).to(tl.float32)))
    if NEG_EIGVAL:
        beta *= 2
    S *= keep
    write = (v - tl.sum(S * k[:, None], axis=0)) * beta
    S += k[:, None] * write[None, :]
    tl.store(state_at, S, mask=inside)
    o = tl.sum(S * q[:, None], axis=0).to(dtype).to(tl.float32)
    o *= tl.rsqrt(tl.sum(o * o, axis=0) / V + eps)
    gate = tl.load(gate_ptr + b * gate_B + h * V + at_V, mask=in_V, other=0.0).to(tl.float32)
    y = o * tl.load(norm_ptr + at_V, mask=in_V, other=0.0).to(tl.float32)
    y *= gate / (1 + tl.exp(-gate))
    tl.store(y_ptr + bh * V + at_V, y.to(dtype), mask=in_V)
