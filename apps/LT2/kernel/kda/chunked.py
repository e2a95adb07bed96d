"""Kimi delta attention chunk by chunk, in plain torch: what trains on CPU. README.md derives it.

Shapes: M chunks of all sequences together, H heads, C tokens in a chunk, K key and V value width,
N sequences; apps/LT2/kernel/chunks.py says how chunks are numbered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.chunks import ChunkLayout, eager_on_documents
from apps.LT2.kernel.delta import delta_rule_in_chunks
from apps.LT2.kernel.kda.scores import DecayedScores

# Scores cost C x K steps a token, states passed from chunk to chunk K x V / C.
CHUNK = 16


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
    layout = ChunkLayout.of(B, T, cu_seqlens, CHUNK)

    q_MHCK = layout.to_chunks(q_BTHK).to(dtype) * K**-0.5
    k_MHCK = layout.to_chunks(k_BTHK).to(dtype)
    v_MHCV = layout.to_chunks(v_BTHV).to(dtype)
    beta_MHC1 = layout.to_chunks(beta_BTH[..., None]).to(dtype)

    # Summed in fp64: after strong decay the sums are large and their differences small.
    sum_MHCK = layout.to_chunks(g_BTHK).double().cumsum(-2)
    kk_MHCC, qk_MHCC = DecayedScores.apply(q_MHCK, k_MHCK, sum_MHCK)
    o_MHCV, final_NHKV = delta_rule_in_chunks(
        layout,
        q_MHCK,
        k_MHCK,
        v_MHCV,
        beta_MHC1,
        kk_MHCC=kk_MHCC,
        qk_MHCC=qk_MHCC,
        from_start=sum_MHCK.to(dtype).exp(),
        to_end=(sum_MHCK[:, :, -1:] - sum_MHCK).to(dtype).exp(),
        whole=sum_MHCK[:, :, -1, :, None].to(dtype).exp(),
        state=state,
    )
    return layout.from_chunks(o_MHCV, B, T).to(v_BTHV.dtype), final_NHKV
