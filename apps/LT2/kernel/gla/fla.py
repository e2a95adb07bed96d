"""Gated linear attention on CUDA: fla's chunk kernels as one custom operator.

fla's own entry point is a graph break; as an operator with its backward registered, a block around
it compiles whole. Forward keeps the inputs, with the summed decay in place of the decay, and the
scores inside chunks; states are computed again in backward. Shapes as in `gla`; C is the chunk of
64 tokens.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from apps.LT2.kernel.fla import (
    CHUNK,
    check_even_widths,
    check_fla_inputs,
    import_fla,
    packed_arguments,
    register_gradient,
    sum_decay,
    take_tables_from_host,
    widen,
    widen_state,
)


def gla_fla(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `gla`, for 16-bit q, k, v on CUDA."""
    check_fla_inputs("gla", q_BTHK, k_BTHK, v_BTHV)
    check_even_widths("gla", "model.gla, model.hgrn2", k_BTHK, v_BTHV)
    K, V = k_BTHK.shape[-1], v_BTHV.shape[-1]
    o_BTHV, final_NHKV, _, _ = _forward(
        widen(q_BTHK),
        widen(k_BTHK),
        widen(v_BTHV),
        widen(g_BTHK.float()),
        widen_state(state),
        cu_seqlens,
        scale,
    )
    return o_BTHV[..., :V], final_NHKV[..., :K, :V]


@torch.library.custom_op("lt2::gla", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o (B, T, H, V), final state (N, H, K, V), decay summed in chunks (B, T, H, K), scores inside
    chunks (B, T, H, C), of which those with later tokens are not written."""
    with torch.cuda.device(q.device):
        packed = packed_arguments(cu_seqlens)
        g_sum, scores, _, final, o = _fla().chunk_gla_fwd(
            q=q,
            k=k,
            v=v,
            g=None,
            g_cumsum=sum_decay(g, packed),
            scale=scale,
            initial_state=state,
            output_final_state=True,
            chunk_size=CHUNK,
            **packed,
        )
    return o, final, g_sum, scores


@_forward.register_fake
def _(q, k, v, g, state, cu_seqlens, scale):
    B, T, H, K = q.shape
    n_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = g.new_empty(n_sequences, H, K, v.shape[-1])
    return torch.empty_like(v), final, torch.empty_like(g), g.new_empty(B, T, H, CHUNK)


@torch.library.custom_op("lt2::gla_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_sum: Tensor,
    scores: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and state (empty without a state)."""
    with torch.cuda.device(q.device):
        dq, dk, dv, dg, dstate = _fla().chunk_gla_bwd(
            q=q,
            k=k,
            v=v,
            g=None,
            g_cumsum=g_sum,
            scale=scale,
            initial_state=state,
            h=None,
            A=scores,
            do=do.contiguous(),
            dht=None if dfinal is None else dfinal.contiguous(),
            chunk_size=CHUNK,
            **packed_arguments(cu_seqlens),
        )
    dstate = g_sum.new_empty(0) if dstate is None else dstate
    return dq.to(q.dtype), dk.to(k.dtype), dv, dg, dstate


@_backward.register_fake
def _(q, k, v, g_sum, scores, state, cu_seqlens, scale, do, dfinal):
    dstate = g_sum.new_empty(0) if state is None else torch.empty_like(state)
    dqkv = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    return *dqkv, torch.empty_like(g_sum), dstate


register_gradient(_forward, _backward, sums_decay=True)


def _fla() -> ModuleType:
    take_tables_from_host()
    return import_fla("fla.ops.gla.chunk")
