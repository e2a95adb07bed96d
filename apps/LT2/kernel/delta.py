"""The chunked form of the delta rules in plain torch: what trains on CPU.

A delta rule reads what the decayed state holds under a key, and writes the difference to the value:

    S_t = D_t S_{t-1} + k_t u_t^T        u_t = beta_t (v_t - (D_t S_{t-1})^T k_t)

with D_t diagonal: 1 (DeltaNet), one factor per head (Gated DeltaNet) or per key channel (KDA).
Inside a chunk the writes depend on each other only through a unit triangular system, so they are
solved at once (the WY form of https://arxiv.org/abs/2412.06464); only the state passes between
chunks. gated_delta_rule/README.md derives the formulas.

Shapes: M chunks of all sequences, H heads, C tokens in a chunk, K key and V value head dim, N
sequences; apps/LT2/kernel/chunks.py describes how chunks are numbered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.arguments import wide_dtype
from apps.LT2.kernel.chunks import (
    CHANNEL_CHUNK,
    CHUNK,
    ChannelDecay,
    ChunkLayout,
    HeadDecay,
    eager_on_documents,
    pass_state,
)


@eager_on_documents
def delta_rule_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Tensor,
    beta_BTH: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `gated_delta_rule` for g (B, T, H) and `kda` for g (B, T, H, K).

    q is multiplied by K**-0.5. fp64 inputs are computed in fp64, others in fp32.
    """
    dtype = wide_dtype(v_BTHV.dtype)
    B, T, _, K = q_BTHK.shape
    by_channel = g.ndim == 4
    layout = ChunkLayout.of(B, T, cu_seqlens, CHANNEL_CHUNK if by_channel else CHUNK)
    q_MHCK = layout.to_chunks(q_BTHK).to(dtype) * K**-0.5
    k_MHCK = layout.to_chunks(k_BTHK).to(dtype)
    v_MHCV = layout.to_chunks(v_BTHV).to(dtype)
    beta_MHC1 = layout.to_chunks(beta_BTH[..., None]).to(dtype)
    if by_channel:
        decay = ChannelDecay.of(layout.to_chunks(g), dtype)
    else:
        decay = HeadDecay.of(layout.to_chunks(g[..., None])[..., 0], dtype)
    kk_MHCC, qk_MHCC = decay.scores(k_MHCK, k_MHCK, q_MHCK)

    # The solver reads the strict lower triangle only; the diagonal counts as ones.
    rhs = torch.cat([v_MHCV, k_MHCK * decay.from_start], dim=-1) * beta_MHC1
    solved = torch.linalg.solve_triangular(
        kk_MHCC * beta_MHC1, rhs, upper=False, unitriangular=True
    )
    u_MHCV, w_MHCK = solved.split([v_MHCV.shape[-1], K], dim=-1)
    k_to_end_MHKC = (k_MHCK * decay.to_end).mT
    starts_MHKV, final_NHKV = pass_state(
        layout,
        keep=decay.whole,
        erase=k_to_end_MHKC @ w_MHCK,
        write=k_to_end_MHKC @ u_MHCV,
        state=state,
    )
    writes_MHCV = u_MHCV - w_MHCK @ starts_MHKV
    o_MHCV = (q_MHCK * decay.from_start) @ starts_MHKV + qk_MHCC @ writes_MHCV
    return layout.from_chunks(o_MHCV, B, T).to(v_BTHV.dtype), final_NHKV
