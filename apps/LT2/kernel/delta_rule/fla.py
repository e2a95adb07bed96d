"""The delta rule on CUDA: fla's chunk kernels as one custom operator.

fla's own entry point is a graph break; as an operator with its backward registered, a block around
it compiles whole. Forward keeps the inputs and the solved triangular systems; states and WY vectors
are computed again in backward. Shapes as in `delta_rule`; C is the chunk of 64 tokens.
"""

from __future__ import annotations

from types import ModuleType

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


def delta_rule_fla(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `delta_rule`, for 16-bit q, k, v on CUDA."""
    check_delta_rule_inputs("delta_rule", "model.deltanet", q_BTHK, k_BTHK, v_BTHV)
    K, V = k_BTHK.shape[-1], v_BTHV.shape[-1]
    o_BTHV, final_NHKV, _ = _forward(
        widen(q_BTHK),
        widen(k_BTHK),
        widen(v_BTHV),
        beta_BTH.float().contiguous(),
        widen_state(state),
        cu_seqlens,
        K**-0.5,
    )
    return o_BTHV[..., :V], final_NHKV[..., :K, :V]


@torch.library.custom_op("lt2::delta_rule", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, T, H, V), final state (N, H, K, V), solved systems (B, T, H, C)."""
    with torch.cuda.device(q.device):
        o, solved, final = _fla().chunk_delta_rule_fwd(
            q=q,
            k=k,
            v=v,
            beta=beta,
            scale=scale,
            initial_state=state,
            output_final_state=True,
            chunk_size=CHUNK,
            **packed_arguments(cu_seqlens),
        )
    return o, final, solved


@_forward.register_fake
def _(q, k, v, beta, state, cu_seqlens, scale):
    B, T, H, K = q.shape
    n_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty(n_sequences, H, K, v.shape[-1], dtype=torch.float32)
    return torch.empty_like(v), final, k.new_empty(B, T, H, CHUNK)


@torch.library.custom_op("lt2::delta_rule_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    solved: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    do: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta and state (empty without a state)."""
    with torch.cuda.device(q.device):
        dq, dk, dv, dbeta, dstate = _fla().chunk_delta_rule_bwd(
            q=q,
            k=k,
            v=v,
            beta=beta,
            A=solved,
            scale=scale,
            initial_state=state,
            do=do.contiguous(),
            dht=None if dfinal is None else dfinal.contiguous(),
            chunk_size=CHUNK,
            **packed_arguments(cu_seqlens),
        )
    return dq, dk, dv, dbeta, q.new_empty(0) if dstate is None else dstate


@_backward.register_fake
def _(q, k, v, beta, solved, state, cu_seqlens, scale, do, dfinal):
    dstate = q.new_empty(0) if state is None else torch.empty_like(state)
    dqkv = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    return *dqkv, torch.empty_like(beta), dstate


register_gradient(_forward, _backward, sums_decay=False)


def _fla() -> ModuleType:
    return import_fla("fla.ops.delta_rule.chunk")
