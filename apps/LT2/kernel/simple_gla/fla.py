"""Linear attention with one decay a head on CUDA: fla's chunk kernels as one custom operator.

fla's own entry point is a graph break; as an operator with its backward registered, a block around
it compiles whole. Forward keeps the inputs, with the summed decay in place of the decay; states are
computed again in backward. fla's kernels take q and k of every head: those of a group are repeated
inside the operator, and so never kept. Shapes as in `simple_gla`.
"""

from __future__ import annotations

import math
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
    sum_decay_gradient_in_fp32,
    take_tables_from_host,
    widen,
    widen_state,
)
from lingua.transformer import repeat_kv


def simple_gla_fla(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `simple_gla`, for 16-bit q, k, v on CUDA."""
    check_fla_inputs("simple_gla", q_BTGK, k_BTGK, v_BTHV)
    check_even_widths("simple_gla", "model.retnet, model.mamba2", k_BTGK, v_BTHV)
    K, V = k_BTGK.shape[-1], v_BTHV.shape[-1]
    o_BTHV, final_NHKV, _ = _forward(
        widen(q_BTGK),
        widen(k_BTGK),
        widen(v_BTHV),
        g.float().contiguous(),
        widen_state(state),
        cu_seqlens,
        scale,
    )
    return o_BTHV[..., :V], final_NHKV[..., :K, :V]


@torch.library.custom_op("lt2::simple_gla", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, T, H, V), final state (N, H, K, V), and g in base 2 as the kernels read it: summed in
    chunks, or constant."""
    repeats = v.shape[2] // q.shape[2]
    with torch.cuda.device(q.device):
        packed = packed_arguments(cu_seqlens)
        g_read = g / math.log(2) if g.ndim == 1 else sum_decay(g, packed)
        o, final = _fla().chunk_simple_gla_fwd(
            q=repeat_kv(q, repeats),
            k=repeat_kv(k, repeats),
            v=v,
            **_decay_arguments(g_read),
            scale=scale,
            initial_state=state,
            output_final_state=True,
            chunk_size=CHUNK,
            **packed,
        )
    return o, final, g_read


@_forward.register_fake
def _(q, k, v, g, state, cu_seqlens, scale):
    n_sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = g.new_empty(n_sequences, v.shape[2], q.shape[3], v.shape[3])
    return torch.empty_like(v), final, torch.empty_like(g)


@torch.library.custom_op("lt2::simple_gla_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_read: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g (empty for a constant) and state (empty without a state)."""
    groups, repeats = q.shape[2], v.shape[2] // q.shape[2]
    with torch.cuda.device(q.device):
        packed = packed_arguments(cu_seqlens)
        dq, dk, dv, dg, dstate = _fla().chunk_simple_gla_bwd(
            q=repeat_kv(q, repeats),
            k=repeat_kv(k, repeats),
            v=v,
            **_decay_arguments(g_read),
            initial_state=state,
            do=do.contiguous(),
            dht=None if dfinal is None else dfinal.contiguous(),
            scale=scale,
            chunk_size=CHUNK,
            **packed,
        )
        if repeats > 1:
            dq, dk = (x.unflatten(2, (groups, repeats)).sum(3) for x in (dq, dk))
        # What a sum of decays gets, each of its terms gets.
        dg = g_read.new_empty(0) if dg is None else sum_decay(dg, packed, reverse=True)
    return dq, dk, dv, dg, g_read.new_empty(0) if dstate is None else dstate


@_backward.register_fake
def _(q, k, v, g_read, state, cu_seqlens, scale, do, dfinal):
    dqkv = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    dg = g_read.new_empty(0) if g_read.ndim == 1 else torch.empty_like(g_read)
    return *dqkv, dg, g_read.new_empty(0) if state is None else torch.empty_like(state)


register_gradient(_forward, _backward, sums_decay=True)


def _decay_arguments(g_read: Tensor) -> dict[str, Tensor | None]:
    constant = g_read.ndim == 1
    return {"g": None if constant else g_read, "g_gamma": g_read if constant else None}


def _fla() -> ModuleType:
    sum_decay_gradient_in_fp32()
    take_tables_from_host()
    return import_fla("fla.ops.simple_gla.chunk")
