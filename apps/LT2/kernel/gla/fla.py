"""Gated linear attention on fla's chunk kernels: the operator `lt2::gla`.

Kept for backward: the inputs, with the summed decay in place of the decay, and the fp32 scores
inside chunks; entries for later tokens are not written. States are recomputed. Shapes as in `gla`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.fla import (
    ChunkOperator,
    Packed,
    Tensors,
    import_fla,
    import_with_16_bit_gradients,
    sum_decay,
)


def _forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, packed: Packed, **options: Any) -> Tensors:
    g_sum, scores, _, final, o = import_fla("fla.ops.gla.chunk").chunk_gla_fwd(
        q=q, k=k, v=v, g=None, g_cumsum=sum_decay(g, packed), **packed, **options
    )
    return o, final, g_sum, scores


def _backward(
    q: Tensor, k: Tensor, v: Tensor, g_sum: Tensor, scores: Tensor, packed: Packed, **options: Any
) -> tuple[Tensor | None, ...]:
    backward = import_with_16_bit_gradients(
        "fla.ops.gla.chunk", "chunk_gla_bwd_dqkg", "chunk_gla_bwd_kernel_inter"
    )
    return backward.chunk_gla_bwd(
        q=q, k=k, v=v, g=None, g_cumsum=g_sum, h=None, A=scores, **packed, **options
    )


OPERATOR = ChunkOperator(
    "gla",
    ("g",),
    _forward,
    _backward,
    n_matrices=1,
    matrix_dtype=torch.float32,
    section="model.gla, model.hgrn2",
)
