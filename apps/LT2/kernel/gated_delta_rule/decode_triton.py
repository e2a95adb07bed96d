"""A decode step of Gated DeltaNet from the convolution to the output projection, in one kernel.

A program takes one head of one row: unit q and k, decay, delta rule, gated RMSNorm. The values are
independent up to the norm, so it takes some columns of the state at a time. Shapes as in
`gated_delta_layer_step`.
"""

# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from typing import Any

from torch import Tensor

from apps.LT2.kernel.triton_jit import jit, tl, triton

FEW_PROGRAMS = 64  # halfway between the two numbers that were measured


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
    **sizes: Any,
) -> Tensor:
    """Run the kernel; `sizes` replaces some of `kernel_sizes`, to measure them."""
    B, H, K, V = state_BHKV.shape
    sizes = kernel_sizes(B * H) | sizes
    sizes["BLOCK_V"] = min(sizes["BLOCK_V"], triton.next_power_of_2(V))
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
        PARTS=triton.next_power_of_2(triton.cdiv(V, sizes["BLOCK_V"])),
        NEG_EIGVAL=neg_eigval,
        EARLY=early,
        **sizes,
        **({"launch_pdl": True} if early else {}),
    )
    return y_BC


def kernel_sizes(n_programs: int) -> dict[str, Any]:
    """Return columns of the state at a time, warps, and stages of prefetch.

    On an H200 at 1B, the first were best at batch 1 (16 programs), the second at batch 8 (128).
    """
    if n_programs <= FEW_PROGRAMS:
        return {"BLOCK_V": 64, "num_warps": 4, "STAGES": 3}
    return {"BLOCK_V": 128, "num_warps": 8, "STAGES": 2}


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
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    NEG_EIGVAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        # Bring the state to L2 before the wait. The kernel before this one doesn't write it.
        line = tl.arange(0, triton.next_power_of_2(K * V // 32))  # of 128 bytes
        at = state_ptr + bh * K * V + tl.minimum(line * 32, K * V - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [at],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.extra.cuda.gdc_wait()
    at_K = tl.arange(0, BLOCK_K)
    in_K = at_K < K
    row = streams_ptr + b * streams_B
    q = tl.load(row + h * K + at_K, mask=in_K, other=0.0).to(tl.float32)
    k = tl.load(row + (H + h) * K + at_K, mask=in_K, other=0.0).to(tl.float32)
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
    v_at = row + 2 * H * K + h * V
    state_at = state_ptr + bh * K * V + at_K[:, None] * V
    parts = tl.arange(0, PARTS)[:, None]
    o = tl.zeros([PARTS, BLOCK_V], tl.float32)
    for part in tl.range(0, tl.cdiv(V, BLOCK_V), num_stages=STAGES):
        at_V = part * BLOCK_V + tl.arange(0, BLOCK_V)
        in_V = at_V < V
        inside = in_K[:, None] & in_V[None, :]
        S = tl.load(state_at + at_V[None, :], mask=inside, other=0.0) * keep
        v = tl.load(v_at + at_V, mask=in_V, other=0.0).to(tl.float32)
        write = (v - tl.sum(S * k[:, None], axis=0)) * beta
        S += k[:, None] * write[None, :]
        tl.store(state_at + at_V[None, :], S, mask=inside)
        o = tl.where(parts == part, tl.sum(S * q[:, None], axis=0)[None, :], o)
    at = parts * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    in_V = at < V
    o = o.to(dtype).to(tl.float32)
    o *= tl.rsqrt(tl.sum(tl.sum(o * o, axis=1), axis=0) / V + eps)
    gate = tl.load(gate_ptr + b * gate_B + h * V + at, mask=in_V, other=0.0).to(tl.float32)
    y = o * tl.load(norm_ptr + at, mask=in_V, other=0.0).to(tl.float32)
    y *= gate / (1 + tl.exp(-gate))
    tl.store(y_ptr + bh * V + at, y.to(dtype), mask=in_V)
