"""Linear attention with one decay per head on fla's chunk kernels: the operator `lt2::simple_gla`.

Kept for backward: the inputs, with the summed decay in place of the decay. States are recomputed.
fla's kernels take q and k of every head. A group's q and k are repeated inside the operator, so
autograd keeps them once. Shapes as in `simple_gla`.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from apps.LT2.kernel.fla import ChunkOperator, Packed, Tensors, import_fla, sum_decay
from lingua.transformer import repeat_kv


def _forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, packed: Packed, **options: Any) -> Tensors:
    repeats = v.shape[2] // q.shape[2]
    g_sum = g / math.log(2) if g.ndim == 1 else sum_decay(g, packed)
    o, final = import_fla("fla.ops.simple_gla.chunk").chunk_simple_gla_fwd(
        q=repeat_kv(q, repeats),
        k=repeat_kv(k, repeats),
        v=v,
        **_decay_arguments(g_sum),
        **packed,
        **options,
    )
    return o, final, g_sum


def _backward(
    q: Tensor, k: Tensor, v: Tensor, g_sum: Tensor, packed: Packed, **options: Any
) -> tuple[Tensor | None, ...]:
    groups, repeats = q.shape[2], v.shape[2] // q.shape[2]
    dq, dk, dv, dg, dstate = import_fla("fla.ops.simple_gla.chunk").chunk_simple_gla_bwd(
        q=repeat_kv(q, repeats),
        k=repeat_kv(k, repeats),
        v=v,
        **_decay_arguments(g_sum),
        **packed,
        **options,
    )
    if repeats > 1:
        dq, dk = (x.unflatten(2, (groups, repeats)).sum(3) for x in (dq, dk))
    # Each decay of a sum gets the gradient of the sum.
    return dq, dk, dv, None if dg is None else sum_decay(dg, packed, reverse=True), dstate


def _decay_arguments(g_sum: Tensor) -> dict[str, Tensor | None]:
    """Pass a constant decay (H,), which is not summed, as g_gamma."""
    constant = g_sum.ndim == 1
    return {"g": None if constant else g_sum, "g_gamma": g_sum if constant else None}


OPERATOR = ChunkOperator(
    "simple_gla", ("g",), _forward, _backward, n_matrices=0, section="model.retnet, model.mamba2"
)
