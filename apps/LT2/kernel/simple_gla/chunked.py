"""Linear attention with one decay per head in chunks, in plain torch: what trains on CPU.

README.md derives it. Products of q and k are computed once per group.

Shapes: M chunks of all sequences, H heads in G groups, C tokens in a chunk, K key and V value head
dim, N sequences; apps/LT2/kernel/chunks.py describes how chunks are numbered.
"""

from __future__ import annotations

from torch import Tensor

from apps.LT2.kernel.arguments import wide_dtype
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
    """Run `simple_gla` in fp32, or in fp64 for fp64 inputs."""
    dtype = wide_dtype(v_BTHV.dtype)
    B, T, H, _ = v_BTHV.shape
    G = q_BTGK.shape[2]
    layout = ChunkLayout.of(B, T, cu_seqlens)

    q_MGCK = layout.to_chunks(q_BTGK).to(dtype) * scale
    k_MGCK = layout.to_chunks(k_BTGK).to(dtype)
    v_MHCV = layout.to_chunks(v_BTHV).to(dtype)
    g_MHC = layout.to_chunks(g.expand(B, T, H)[..., None])[..., 0]
    decay = HeadDecay.of(g_MHC, dtype)

    def by_group(a_MGXY: Tensor, b_MHYZ: Tensor) -> Tensor:
        """Multiply a group's matrix with its heads' matrices: (M, H, X, Z)."""
        product = a_MGXY[:, :, None] @ b_MHYZ.unflatten(1, (G, -1))
        return product.flatten(1, 2)

    # A scalar decay commutes with products, so it is applied to v and o, which heads do not share.
    starts_MHKV, final_NHKV = pass_state(
        layout, keep=decay.whole, write=by_group(k_MGCK.mT, v_MHCV * decay.to_end), state=state
    )
    qk_MHCC = repeat_kv(q_MGCK @ k_MGCK.mT, H // G, dim=1)
    o_MHCV = by_group(q_MGCK, starts_MHKV) * decay.from_start
    o_MHCV = o_MHCV + (qk_MHCC * decay.between_MHCC) @ v_MHCV
    return layout.from_chunks(o_MHCV, B, T).to(v_BTHV.dtype), final_NHKV
