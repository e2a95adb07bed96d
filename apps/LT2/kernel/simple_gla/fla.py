"""Linear attention with one decay per head on fla's chunk kernels: the operator `lt2::simple_gla`.

Kept for backward: the inputs, with the summed decay in place of the decay. States are recomputed.
fla's kernels of states need q and k of every head, so q and k of a group are repeated for them. The
other kernels read q and k of the groups. Shapes as in `simple_gla`.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from apps.LT2.kernel.fla import ChunkOperator, Packed, Tensors, import_fla, sum_decay
from lingua.transformer import repeat_kv


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    packed: Packed,
    *,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    chunk_size: int,
) -> Tensors:
    g_sum = g / math.log(2) if g.ndim == 1 else sum_decay(g, packed)
    options = {"chunk_size": chunk_size, **_decay_arguments(g_sum)}
    states, final = import_fla("fla.ops.common.chunk_h").chunk_fwd_h(
        k=_of_heads(k, v),
        v=v,
        h0=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=packed.get("cu_seqlens"),
        **options,
    )
    o = import_fla("fla.ops.common.chunk_o").chunk_fwd_o(
        q=q, k=k, v=v, h=states, scale=scale, **packed, **options
    )
    return o, final, g_sum


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_sum: Tensor,
    packed: Packed,
    *,
    scale: float,
    initial_state: Tensor | None,
    do: Tensor,
    dht: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor | None, ...]:
    chunk_h, chunk_o = map(import_fla, ("fla.ops.common.chunk_h", "fla.ops.common.chunk_o"))
    options = {"chunk_size": chunk_size, **_decay_arguments(g_sum)}
    of_states = {
        "h0": initial_state,
        "states_in_fp32": True,
        "cu_seqlens": packed.get("cu_seqlens"),
        **options,
    }
    states, _ = chunk_h.chunk_fwd_h(k=_of_heads(k, v), v=v, **of_states)
    q_of_heads = _of_heads(q, v)  # also passed as k: only its shape is read
    dstates, dstate = chunk_h.chunk_bwd_dh(
        q=q_of_heads, k=q_of_heads, v=v, do=do, dht=dht, scale=scale, **of_states
    )
    inputs = {"q": q, "k": k, "do": do, "dh": dstates, "scale": scale, **packed, **options}
    dq, dk, _, dg = chunk_o.chunk_bwd_dqkwg(v=v, h=states, **inputs)
    dv = chunk_o.chunk_bwd_dv(**inputs)
    # Each decay of a sum gets the gradient of the sum.
    return dq, dk, dv, None if dg is None else sum_decay(dg, packed, reverse=True), dstate


def _of_heads(x_BTGK: Tensor, v_BTHV: Tensor) -> Tensor:
    return repeat_kv(x_BTGK, v_BTHV.shape[2] // x_BTGK.shape[2])


def _decay_arguments(g_sum: Tensor) -> dict[str, Any]:
    """Pass a constant decay (H,), which is not summed, as g_gamma."""
    constant = g_sum.ndim == 1
    return {"g": None if constant else g_sum, "g_gamma": g_sum if constant else None}


OPERATOR = ChunkOperator(
    "simple_gla", ("g",), _forward, _backward, n_matrices=0, section="model.retnet, model.mamba2"
)
