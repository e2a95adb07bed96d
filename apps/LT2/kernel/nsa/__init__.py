"""Native sparse attention (https://arxiv.org/abs/2502.11089).

    o_t = g_cmp attend(q_t, block means) + g_slc attend(q_t, chosen blocks)
        + g_win attend(q_t, window)

Shapes: B rows, T queries, S keys, H query heads, G key/value heads, K head dim. README.md has the
math.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.attention import attention
from apps.LT2.kernel.nsa.blocked import sparse_branches_blocked
from apps.LT2.kernel.nsa.blocks import cut_blocks, mean_of_blocks
from apps.LT2.kernel.nsa.decode import branches_of_step, update_means
from apps.LT2.kernel.nsa.naive import nsa_naive
from apps.LT2.kernel.nsa.triton import kernels_support, sparse_branches_triton

SPARSE_BRANCHES = {"blocked": sparse_branches_blocked, "triton": sparse_branches_triton}
ALWAYS_CHOSEN = 3  # the first block, the query's own, and the one before it


def native_sparse_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    gates_BTH3: Tensor,
    *,
    block_size: int,
    n_blocks: int,
    window_size: int,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    attn_impl: str = "auto",
) -> Tensor:
    """Attend with T queries, the last of S tokens, to blocks and a window of those tokens.

    q           (B, T, H, K)   after RoPE, as k; the kernels multiply it by K**-0.5
    k, v        (B, S, G, K)   G divides H; the H / G query heads of a group share their choice
    gates       (B, T, H, 3)   of the compressed, the selected and the window branch
    block_size  tokens in a block
    n_blocks    blocks that a query attends to, at least 3: they include the document's first
                block, the query's own and the one before it; each block counts once
    window_size keys of the window branch, the token itself included
    cu_seqlens  (n_docs + 1,) int32 with B = 1 and T = S: documents do not see each other, and
                each starts a new block
    impl        "naive", "blocked" (plain torch), "triton", or "auto": triton for 16-bit CUDA
                tensors, else blocked
    attn_impl   of `kernel.attention`, for the window branch
    Returns o (B, T, H, K) in q's dtype, differentiable in q, k, v and gates. The choice of blocks
    has no gradient.
    """
    _check_shapes(q_BTHK, k_BSGK, v_BSGK, gates_BTH3, n_blocks, cu_seqlens)
    if impl == "auto":
        impl = "triton" if kernels_support(q_BTHK, k_BSGK, v_BSGK) else "blocked"
    sizes = {"block_size": block_size, "n_blocks": n_blocks, "cu_seqlens": cu_seqlens}
    if impl == "naive":
        return nsa_naive(q_BTHK, k_BSGK, v_BSGK, gates_BTH3, window_size=window_size, **sizes)
    assert impl in SPARSE_BRANCHES, f"impl must be auto, naive, blocked or triton, got {impl!r}"
    supported = impl != "triton" or kernels_support(q_BTHK, k_BSGK, v_BSGK)
    assert supported, f"impl='triton' does not support {q_BTHK.dtype} on {q_BTHK.device}"
    compressed, selected = SPARSE_BRANCHES[impl](q_BTHK, k_BSGK, v_BSGK, **sizes)
    window = _window_attention(q_BTHK, k_BSGK, v_BSGK, window_size, cu_seqlens, attn_impl)
    return _gated_sum((compressed, selected, window), gates_BTH3)


@torch.no_grad()
def native_sparse_attention_step(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGK: Tensor,
    gates_BH3: Tensor,
    cache: tuple[Tensor, Tensor, Tensor, Tensor],
    position_B: Tensor,
    *,
    n_blocks: int,
    window_size: int,
) -> Tensor:
    """Run one token of every row at `position_B`; returns o (B, H, K).

    cache: keys and values (B, S, G, K) with position p in slot p, and the means of their blocks
    (B, C, G, K), S / C tokens each. The token is written to all four in place. No shape depends on
    `position_B`, and nothing syncs with the device. q is multiplied by K**-0.5.
    """
    k_BSGK, v_BSGK, k_BCGK, v_BCGK = cache
    row = torch.arange(len(q_BHK), device=q_BHK.device)
    for new_BGK, x_BSGK, mean_BCGK in ((k_BGK, k_BSGK, k_BCGK), (v_BGK, v_BSGK, v_BCGK)):
        x_BSGK[row, position_B] = new_BGK.to(x_BSGK.dtype)
        update_means(x_BSGK, mean_BCGK, position_B)
    branches = branches_of_step(
        q_BHK, *cache, position_B, n_blocks=n_blocks, window_size=window_size
    )
    return _gated_sum(branches, gates_BH3)


def block_means(x_BSGK: Tensor, block_size: int) -> Tensor:
    """Return the means of each row's blocks, (B, ceil(S / block_size), G, K) in x's dtype.

    The mean of an incomplete last block is undefined.
    """
    blocks = cut_blocks(x_BSGK.shape[1], block_size, None, x_BSGK.device)
    return mean_of_blocks(x_BSGK, blocks, packed=False)


def _window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_size: int, cu_seqlens: Tensor | None, attn_impl: str
) -> Tensor:
    n_past = k.shape[1] - q.shape[1]
    seen = min(n_past, window_size - 1)
    # Zeros stand for the queries of the past, so the attention stays square and causal.
    o = attention(
        F.pad(q, (0, 0, 0, 0, seen, 0)),
        k[:, n_past - seen :],
        v[:, n_past - seen :],
        window=window_size,
        cu_seqlens=cu_seqlens,
        impl=attn_impl,
    )
    return o[:, seen:]


def _gated_sum(branches: tuple[Tensor, ...], gates: Tensor) -> Tensor:
    """Return sum_i branches[i] (..., H, K) * gates[..., i]."""
    first, *others = (gate[..., None] for gate in gates.type_as(branches[0]).unbind(-1))
    o = branches[0] * first
    for branch, gate in zip(branches[1:], others, strict=True):
        o = torch.addcmul(o, branch, gate)
    return o


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, n_blocks: int, cu_seqlens: Tensor | None
) -> None:
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    assert k.shape == v.shape == (B, S, G, K), f"k {k.shape}, v {v.shape} do not match q {q.shape}"
    assert 0 < T <= S, f"{T} queries cannot be the last of {S} tokens"
    assert H % G == 0, f"{G} key/value heads do not divide {H} query heads"
    assert gates.shape == (B, T, H, 3), f"gates must be {(B, T, H, 3)}, got {tuple(gates.shape)}"
    assert n_blocks >= ALWAYS_CHOSEN, f"n_blocks={n_blocks}: {ALWAYS_CHOSEN} are always chosen"
    if cu_seqlens is not None:
        assert B == 1 and T == S, "cu_seqlens packs whole documents into one row"
