"""The delta rule on fla's chunk kernels: the operator `lt2::delta_rule`.

Kept for backward: the inputs and the solved triangular systems. States and WY vectors are
recomputed. Shapes as in `delta_rule`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apps.LT2.kernel.fla import ChunkOperator, Packed, Tensors, import_fla


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
