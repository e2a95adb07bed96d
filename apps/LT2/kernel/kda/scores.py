"""Scores of keys and queries with earlier keys when every channel fades at a rate of its own.

    score_ij = sum_c x_ic k_jc exp(G_ic - G_jc)  for j <= i, else 0        G: g summed in the chunk

Split into exp(G_i) and exp(-G_j) this is a matrix product, but the second factor overflows after
strong decay. So the decay of each pair is computed: C x C x K numbers a chunk, never kept, and few
chunks at a time, which then stay in the processor's cache.

Shapes: M chunks of all sequences together, H heads, C tokens in a chunk, K key width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**18  # decays computed at a time: a MiB in fp32


class DecayedScores(torch.autograd.Function):
    """kk, qk (M, H, C, C) of k, q (M, H, C, K) and the summed log decay G (M, H, C, K) in fp64.

    G must not rise along C. Differentiable once. What score_ij passes to G_ic it also passes to
    x_ic, divided by x_ic; and to -G_jc as to k_jc: so the gradient of G needs no C x C x K numbers.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, G)
        scores = q.new_empty(*q.shape[:3], q.shape[2], 2)
        for piece in _pieces(q):
            readers_MHCK2 = torch.stack([k[piece], q[piece]], dim=-1)
            torch.matmul(_faded_keys(k[piece], G[piece]), readers_MHCK2, out=scores[piece])
        kk, qk = scores.unbind(-1)
        return kk, qk

    @staticmethod
    def backward(ctx, dkk: Tensor, dqk: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, G = ctx.saved_tensors
        dq, dk, dG = torch.empty_like(q), torch.empty_like(k), torch.empty_like(G)
        for piece in _pieces(q):
            k_MHCK, q_MHCK = k[piece], q[piece]
            decay_MHCCK = _decay(G[piece], q.dtype)
            dscores_MHC2C = torch.stack([dkk[piece], dqk[piece]], dim=-2)
            readers_MHC2K = torch.stack([k_MHCK, q_MHCK], dim=-2)
            # As keys: from all their readers.
            from_readers_MHCCK = (dscores_MHC2C.mT @ readers_MHC2K).mul_(decay_MHCCK)
            dkey_MHCK = from_readers_MHCCK.sum(2)
            # As readers: from all their keys.
            faded_MHCCK = decay_MHCCK.mul_(k_MHCK[:, :, None])
            dreader_MHCK, dq_MHCK = (dscores_MHC2C @ faded_MHCCK).unbind(-2)
            dq[piece] = dq_MHCK
            dk[piece] = dreader_MHCK + dkey_MHCK
            dG[piece] = k_MHCK * (dreader_MHCK - dkey_MHCK) + q_MHCK * dq_MHCK
        return dq, dk, dG


def _decay(G_MHCK: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(G_i - G_j) for j <= i, else 0: (M, H, C, C, K)."""
    C = G_MHCK.shape[2]
    later_CC1 = torch.ones(C, C, dtype=torch.bool, device=G_MHCK.device).triu(1)[..., None]
    # Masked before exp: above the diagonal the difference is positive and exp could overflow.
    between = (G_MHCK[:, :, :, None] - G_MHCK[:, :, None]).to(dtype)
    return between.masked_fill_(later_CC1, -torch.inf).exp_()


def _faded_keys(k_MHCK: Tensor, G_MHCK: Tensor) -> Tensor:
    """What is left of key j when token i reads it: (M, H, C, C, K)."""
    return _decay(G_MHCK, k_MHCK.dtype).mul_(k_MHCK[:, :, None])


def _pieces(x_MHCK: Tensor) -> Iterator[slice]:
    M, _, C, _ = x_MHCK.shape
    step = max(1, PIECE // (x_MHCK[0].numel() * C))
    return (slice(first, first + step) for first in range(0, M, step))
