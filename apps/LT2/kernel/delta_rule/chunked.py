"""The delta rule chunk by chunk, in plain torch: what trains on CPU. README.md has the formulas.

Shapes: B batch, T tokens, N sequences, H heads, K key and V value width.
"""

from __future__ import annotations

from torch import Tensor

from apps.LT2.kernel.chunks import eager_on_documents
from apps.LT2.kernel.gated_delta_rule.chunked import gated_delta_rule_chunked


@eager_on_documents
def delta_rule_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `delta_rule`; fp64 inputs are computed in fp64."""
    # Without decay the gated rule is the plain one; its factors of 1 cost C x C products a chunk.
    g_BTH = beta_BTH.new_zeros(beta_BTH.shape)
    return gated_delta_rule_chunked(
        q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state=state, cu_seqlens=cu_seqlens
    )
