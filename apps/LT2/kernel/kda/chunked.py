"""Kimi delta attention chunk by chunk, in plain torch: what trains on CPU. README.md derives it.

Shapes: M chunks of all sequences together, H heads, C tokens in a chunk, K key and V value width,
N sequences; apps/LT2/kernel/chunks.py says how chunks are numbered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.chunks import CHANNEL_CHUNK, ChannelDecay, ChunkLayout, eager_on_documents
from apps.LT2.kernel.delta import delta_rule_in_chunks


@eager_on_documents
def kda_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `kda`; fp64 inputs are computed in fp64."""
    dtype = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    B, T, H, K = q_BTHK.shape
    layout = ChunkLayout.of(B, T, cu_seqlens, CHANNEL_CHUNK)

    q_MHCK = layout.to_chunks(q_BTHK).to(dtype) * K**-0.5
    k_MHCK = layout.to_chunks(k_BTHK).to(dtype)
    v_MHCV = layout.to_chunks(v_BTHV).to(dtype)
    beta_MHC1 = layout.to_chunks(beta_BTH[..., None]).to(dtype)

    decay = ChannelDecay.of(layout.to_chunks(g_BTHK), dtype)
    kk_MHCC, qk_MHCC = decay.scores(k_MHCK, k_MHCK, q_MHCK)
    o_MHCV, final_NHKV = delta_rule_in_chunks(
        layout,
        q_MHCK,
        k_MHCK,
        v_MHCV,
        beta_MHC1,
        kk_MHCC=kk_MHCC,
        qk_MHCC=qk_MHCC,
        from_start=decay.from_start_MHCK,
        to_end=decay.to_end_MHCK,
        whole=decay.whole_MHK1,
        state=state,
    )
    return layout.from_chunks(o_MHCV, B, T).to(v_BTHV.dtype), final_NHKV
