"""Kimi delta attention on fla's chunk kernels: the operator `lt2::kda`.

The caller computes the gate, beta's sigmoid and the norms of q and k in fp32, so fla's fusions of
them stay off. So does fla's `safe_gate`, which needs a lower bound of the decays.
Kept for backward: the inputs, the summed decay, the scores of q and k, and the solved triangular
systems; entries for later tokens are not written. States and WY vectors are recomputed. Shapes as
in `kda`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apps.LT2.kernel.fla import (
    ChunkOperator,
    Packed,
    Tensors,
    import_fla,
    import_with_16_bit_gradients,
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, packed: Packed, **options: Any
) -> Tensors:
    o, final, g_sum, scores, solved, *_ = import_fla("fla.ops.kda.chunk_fwd").chunk_kda_fwd(
        q=q, k=k, v=v, g=g, beta=beta, **packed, **options
    )
    return o, final, g_sum, scores, solved


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_sum: Tensor,
    beta: Tensor,
    scores: Tensor,
    solved: Tensor,
    packed: Packed,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    backward = import_with_16_bit_gradients(
        "fla.ops.kda.chunk_bwd", "chunk_kda_bwd_intra", "chunk_kda_bwd_kernel_intra"
    )
    dq, dk, dv, dbeta, dg, dstate, *_ = backward.chunk_kda_bwd(
        q=q, k=k, v=v, g=g_sum, beta=beta, Aqk=scores, Akk=solved, **packed, **options
    )
    return dq, dk, dv, dg, dbeta, dstate


OPERATOR = ChunkOperator(
    "kda", ("g", "beta"), _forward, _backward, n_matrices=2, section="model.kda", max_key_dim=256
)
