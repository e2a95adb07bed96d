"""The gated delta rule on fla's chunk kernels: the operator `lt2::gated_delta_rule`.

Kept for backward: the inputs, the summed decay and the solved triangular systems. States and WY
vectors are recomputed. Shapes as in `gated_delta_rule`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apps.LT2.kernel.fla import ChunkOperator, Packed, Tensors, import_fla
from apps.LT2.kernel.gated_delta_rule.backward import delta_rule_backward, kernel_supports


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, packed: Packed, **options: Any
) -> Tensors:
    chunk = import_fla("fla.ops.gated_delta_rule.chunk")
    g_sum, o, solved, final, *_ = chunk.chunk_gated_delta_rule_fwd(
        q=q, k=k, v=v, g=g, beta=beta, **packed, **options
    )
    return o, final, g_sum, solved


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_sum: Tensor,
    beta: Tensor,
    solved: Tensor,
    packed: Packed,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    if kernel_supports(k, v):
        return delta_rule_backward(q, k, v, g_sum, beta, solved, packed, **options)
    chunk = import_fla("fla.ops.gated_delta_rule.chunk")
    dq, dk, dv, dbeta, dg, dstate, *_ = chunk.chunk_gated_delta_rule_bwd(
        q=q, k=k, v=v, g=g_sum, beta=beta, A=solved, **packed, **options
    )
    return dq, dk, dv, dg, dbeta, dstate


OPERATOR = ChunkOperator(
    "gated_delta_rule",
    ("g", "beta"),
    _forward,
    _backward,
    n_matrices=1,
    section="model.gdn",
    max_key_dim=256,
)
