"""Kimi delta attention on CUDA: fla's chunk kernels as one custom operator.

fla's own entry point is a graph break; as an operator with its backward registered, a block around
it compiles whole. Its fusions of the gate, of beta's sigmoid and of the norms of q and k stay off:
they are done outside, in fp32. So does its `safe_gate`, which needs decays bounded from below.
Forward keeps the inputs, the summed decay, the scores of q and k and the solved triangular systems;
states and WY vectors are computed again in backward.

Shapes as in `kda`; C is the chunk of 64 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.fla import (
    CHUNK,
    check_delta_rule_inputs,
    import_fla,
    packed_arguments,
    register_gradient,
    widen,
    widen_state,
)


def kda_fla(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `kda`, for 16-bit q, k, v on CUDA."""
    check_delta_rule_inputs("kda", "model.kda", q_BTHK, k_BTHK, v_BTHV)
    K, V = k_BTHK.shape[-1], v_BTHV.shape[-1]
    o_BTHV, final_NHKV, _, _, _ = _forward(
        widen(q_BTHK),
        widen(k_BTHK),
        widen(v_BTHV),
        widen(g_BTHK.float()),
        beta_BTH.float().contiguous(),
        widen_state(state),
        cu_seqlens,
        K**-0.5,
    )
    return o_BTHV[..., :V], final_NHKV[..., :K, :V]


@torch.library.custom_op("lt2::kda", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o (B, T, H, V), final state (N, H, K, V), decay summed in chunks (B, T, H, K) in units of
    log 2, scores and solved systems (B, T, H, C). Scores with later tokens are left unwritten."""
    with torch.cuda.device(q.device):
        o, final, g_sum, scores, solved, *_ = import_fla("fla.ops.kda.chunk_fwd").chunk_kda_fwd(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            scale=scale,
            initial_state=state,
            output_final_state=True,
            chunk_size=CHUNK,
            **packed_arguments(cu_seqlens),
        )
    return o, final, g_sum, scores, solved


@_forward.register_fake
def _(q, k, v, g, beta, state, cu_seqlens, scale):
    B, T, H, K = q.shape
    n_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty(n_sequences, H, K, v.shape[-1], dtype=torch.float32)
    scores, solved = k.new_empty(B, T, H, CHUNK), k.new_empty(B, T, H, CHUNK)
    return torch.empty_like(v), final, torch.empty_like(g), scores, solved


@torch.library.custom_op("lt2::kda_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_sum: Tensor,
    beta: Tensor,
    scores: Tensor,
    solved: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and state (empty without a state)."""
    with torch.cuda.device(q.device):
        dq, dk, dv, dbeta, dg, dstate, _, _ = import_fla("fla.ops.kda.chunk_bwd").chunk_kda_bwd(
            q=q,
            k=k,
            v=v,
            beta=beta,
            Aqk=scores,
            Akk=solved,
            scale=scale,
            initial_state=state,
            do=do.contiguous(),
            dht=None if dfinal is None else dfinal.contiguous(),
            g=g_sum,
            chunk_size=CHUNK,
            **packed_arguments(cu_seqlens),
        )
    # dq and dk come in fp32.
    dstate = q.new_empty(0) if dstate is None else dstate
    return dq.to(q.dtype), dk.to(k.dtype), dv, dg, dbeta, dstate


@_backward.register_fake
def _(q, k, v, g_sum, beta, scores, solved, state, cu_seqlens, scale, do, dfinal):
    dstate = q.new_empty(0) if state is None else torch.empty_like(state)
    dqkv = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    return *dqkv, torch.empty_like(g_sum), torch.empty_like(beta), dstate


register_gradient(_forward, _backward, sums_decay=True)
