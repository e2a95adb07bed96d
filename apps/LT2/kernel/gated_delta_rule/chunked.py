"""The gated delta rule chunk by chunk, in plain torch: what trains on CPU.

Inside a chunk the writes depend on each other only through a unit triangular system, so they are
solved for at once (the WY form of https://arxiv.org/abs/2412.06464); between chunks only the state
passes. README.md derives the formulas below.

Shapes: M chunks of all sequences together, H heads, C tokens in a chunk, K key and V value width,
N sequences; apps/LT2/kernel/chunks.py says how chunks are numbered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.chunks import ChunkLayout, HeadDecay, eager_on_documents
from apps.LT2.kernel.delta import delta_rule_in_chunks


@eager_on_documents
def gated_delta_rule_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `gated_delta_rule`; fp64 inputs are computed in fp64."""
    dtype = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    B, T, H, K = q_BTHK.shape
    layout = ChunkLayout.of(B, T, cu_seqlens)

    q_MHCK = layout.to_chunks(q_BTHK).to(dtype) * K**-0.5
    k_MHCK = layout.to_chunks(k_BTHK).to(dtype)
    v_MHCV = layout.to_chunks(v_BTHV).to(dtype)
    g_MHC = layout.to_chunks(g_BTH[..., None])[..., 0]
    beta_MHC1 = layout.to_chunks(beta_BTH[..., None]).to(dtype)

    decay = HeadDecay.of(g_MHC, dtype)
    o_MHCV, final_NHKV = delta_rule_in_chunks(
        layout,
        q_MHCK,
        k_MHCK,
        v_MHCV,
        beta_MHC1,
        kk_MHCC=(k_MHCK @ k_MHCK.mT) * decay.between_MHCC,
        qk_MHCC=(q_MHCK @ k_MHCK.mT) * decay.between_MHCC,
        from_start=decay.from_start_MHC1,
        to_end=decay.to_end_MHC1,
        whole=decay.whole_MH11,
        state=state,
    )
    return layout.from_chunks(o_MHCV, B, T).to(v_BTHV.dtype), final_NHKV
