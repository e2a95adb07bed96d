"""What the delta rules share, whatever their decay: the chunk form.

A delta rule reads what the faded state holds under a key and writes the difference to the value:

    S_t = D_t S_{t-1} + k_t u_t^T        u_t = beta_t (v_t - (D_t S_{t-1})^T k_t)

with D_t diagonal: 1 (DeltaNet), one factor a head (Gated DeltaNet) or one a key channel (KDA).
gated_delta_rule/README.md derives the chunk form. Shapes: M chunks of all sequences together, H
heads, C tokens in a chunk, K key and V value width, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.chunks import ChunkLayout, pass_state


def delta_rule_in_chunks(
    layout: ChunkLayout,
    q_MHCK: Tensor,
    k_MHCK: Tensor,
    v_MHCV: Tensor,
    beta_MHC1: Tensor,
    *,
    kk_MHCC: Tensor,
    qk_MHCC: Tensor,
    from_start: Tensor,
    to_end: Tensor,
    whole: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o (M, H, C, V) and the state (N, H, K, V) after each sequence. q is scaled already.

    kk, qk (M, H, C, C)   k_i . k_j and q_i . k_j under the decay after j up to i; 0 for j > i
    from_start, to_end    decay up to i, and after j; broadcast to (M, H, C, K)
    whole                 decay of the whole chunk; broadcasts to (M, H, K, V)
    """
    # Writes inside a chunk depend on each other through a unit triangular system. The solver reads
    # its strict lower triangle only: the diagonal counts as ones.
    rhs = torch.cat([v_MHCV, k_MHCK * from_start], dim=-1) * beta_MHC1
    solved = torch.linalg.solve_triangular(
        kk_MHCC * beta_MHC1, rhs, upper=False, unitriangular=True
    )
    u_MHCV, w_MHCK = solved.split([v_MHCV.shape[-1], k_MHCK.shape[-1]], dim=-1)
    k_to_end_MHKC = (k_MHCK * to_end).mT
    starts_MHKV, final_NHKV = pass_state(
        layout,
        keep=whole,
        erase=k_to_end_MHKC @ w_MHCK,
        write=k_to_end_MHKC @ u_MHCV,
        state=state,
    )
    writes_MHCV = u_MHCV - w_MHCK @ starts_MHKV
    o_MHCV = (q_MHCK * from_start) @ starts_MHKV + qk_MHCC @ writes_MHCV
    return o_MHCV, final_NHKV
