"""Linear attention with one decay a head, chunk by chunk, in plain torch: what trains on CPU.

README.md derives it. What heads of a group share, products of q and k, is computed once a group.

Shapes: M chunks of all sequences together, H heads in G groups of R, C tokens in a chunk, K key and
V value width, N sequences; apps/LT2/kernel/chunks.py says how chunks are numbered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.chunks import ChunkLayout, HeadDecay, eager_on_documents, pass_state
from lingua.transformer import repeat_kv


@eager_on_documents
def simple_gla_chunked(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `simple_gla`; fp64 inputs are computed in fp64."""
    dtype = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    B, T, H, _ = v_BTHV.shape
    G = q_BTGK.shape[2]
    layout = ChunkLayout.of(B, T, cu_seqlens)

    q_MGCK = layout.to_chunks(q_BTGK).to(dtype) * scale
    k_MGCK = layout.to_chunks(k_BTGK).to(dtype)
    v_MHCV = layout.to_chunks(v_BTHV).to(dtype)
    g_MHC = layout.to_chunks(g.expand(B, T, H)[..., None])[..., 0]
    decay = HeadDecay.of(g_MHC, dtype)

    def by_group(a_MGXY: Tensor, b_MHYZ: Tensor) -> Tensor:
        """The product of what a group shares with what its heads have, (M, H, X, Z)."""
        product = a_MGXY[:, :, None] @ b_MHYZ.unflatten(1, (G, -1))
        return product.flatten(1, 2)

    # A scalar decay passes through products, so it can go to the side that heads do not share.
    starts_MHKV, final_NHKV = pass_state(
        layout,
        keep=decay.whole_MH11,
        write=by_group(k_MGCK.mT, v_MHCV * decay.to_end_MHC1),
        state=state,
    )
    qk_MHCC = repeat_kv(q_MGCK @ k_MGCK.mT, H // G, dim=1)
    o_MHCV = by_group(q_MGCK, starts_MHKV) * decay.from_start_MHC1
    o_MHCV = o_MHCV + (qk_MHCC * decay.between_MHCC) @ v_MHCV
    return layout.from_chunks(o_MHCV, B, T).to(v_BTHV.dtype), final_NHKV
