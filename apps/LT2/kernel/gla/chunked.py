"""Gated linear attention in chunks, in plain torch: what trains on CPU. README.md derives it.

Shapes: M chunks of all sequences, H heads, C tokens in a chunk, K key and V value head dim, N
sequences; apps/LT2/kernel/chunks.py describes how chunks are numbered.
"""

from __future__ import annotations

from torch import Tensor

from apps.LT2.kernel.arguments import wide_dtype
from apps.LT2.kernel.chunks import (
    CHANNEL_CHUNK,
    ChannelDecay,
    ChunkLayout,
    eager_on_documents,
    pass_state,
)


@eager_on_documents
def gla_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `gla` in fp32, or in fp64 for fp64 inputs."""
    dtype = wide_dtype(v_BTHV.dtype)
    B, T = q_BTHK.shape[:2]
    layout = ChunkLayout.of(B, T, cu_seqlens, CHANNEL_CHUNK)

    q_MHCK = layout.to_chunks(q_BTHK).to(dtype) * scale
    k_MHCK = layout.to_chunks(k_BTHK).to(dtype)
    v_MHCV = layout.to_chunks(v_BTHV).to(dtype)
    decay = ChannelDecay.of(layout.to_chunks(g_BTHK), dtype)

    starts_MHKV, final_NHKV = pass_state(
        layout, keep=decay.whole, write=(k_MHCK * decay.to_end).mT @ v_MHCV, state=state
    )
    (scores_MHCC,) = decay.scores(k_MHCK, q_MHCK)
    o_MHCV = (q_MHCK * decay.from_start) @ starts_MHKV + scores_MHCC @ v_MHCV
    return layout.from_chunks(o_MHCV, B, T).to(v_BTHV.dtype), final_NHKV
