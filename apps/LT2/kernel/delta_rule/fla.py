"""The delta rule on fla's chunk kernels: the operator `lt2::delta_rule`.

Kept for backward: the inputs and the solved triangular systems. States and WY vectors are
recomputed. Shapes as in `delta_rule`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apps.LT2.kernel.fla import ChunkOperator, Packed, Tensors, import_fla
from apps.LT2.kernel.gated_delta_rule.backward import delta_rule_backward, kernel_supports


def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, packed: Packed, **options: Any
) -> Tensors:
    o, solved, final = import_fla("fla.ops.delta_rule.chunk").chunk_delta_rule_fwd(
        q=q, k=k, v=v, beta=beta, **packed, **options
    )
    return o, final, solved


def _backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, solved: Tensor, packed: Packed, **options: Any
) -> tuple[Tensor | None, ...]:
    if kernel_supports(k, v):
        dq, dk, dv, _, dbeta, dstate = delta_rule_backward(
            q, k, v, None, beta, solved, packed, **options
        )
        return dq, dk, dv, dbeta, dstate
    return import_fla("fla.ops.delta_rule.chunk").chunk_delta_rule_bwd(
        q=q, k=k, v=v, beta=beta, A=solved, **packed, **options
    )


OPERATOR = ChunkOperator(
    "delta_rule",
    ("beta",),
    _forward,
    _backward,
    n_matrices=1,
    section="model.deltanet",
    max_key_dim=256,
)
