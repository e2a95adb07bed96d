"""Scores of queries with earlier keys when every channel fades at a rate of its own.

    score_ij = sum_c x_ic k_jc exp(G_ic - G_jc)  for j <= i, else 0        G: g summed in the chunk

Split into exp(G_i) and exp(-G_j) this is a matrix product, but the second factor overflows after
strong decay. So the decay of each pair is computed: C x C x K numbers a chunk, never kept, and few
chunks at a time, which then stay in the processor's cache.

Shapes: M chunks of all sequences together, H heads, C tokens in a chunk, K key width, R readers x
of the same keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**18  # decays computed at a time: a MiB in fp32


class DecayedScores(torch.autograd.Function):
    """apply(k, G, *readers): the scores (M, H, C, C) of each of the readers with the keys.

    k and each reader (M, H, C, K); G (M, H, C, K) in fp64 must not rise along C. Differentiable
    once. What score_ij passes to G_ic it also passes to x_ic, divided by x_ic; and to -G_jc as to
    k_jc: so the gradient of G needs no C x C x K numbers.
    """

    @staticmethod
    def forward(ctx, k: Tensor, G: Tensor, *readers: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(k, G, *readers)
        scores = k.new_empty(*k.shape[:3], k.shape[2], len(readers))
        for piece in _pieces(k):
            readers_MHCKR = torch.stack([x[piece] for x in readers], dim=-1)
            faded_MHCCK = _decay(G[piece], k.dtype).mul_(k[piece][:, :, None])
            torch.matmul(faded_MHCCK, readers_MHCKR, out=scores[piece])
        return scores.unbind(-1)

    @staticmethod
    def backward(ctx, *dscores: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        k, G, *readers = ctx.saved_tensors
        dk, dG = torch.empty_like(k), torch.empty_like(G)
        dreaders = [torch.empty_like(k) for _ in readers]
        for piece in _pieces(k):
            k_MHCK = k[piece]
            decay_MHCCK = _decay(G[piece], k.dtype)
            dscores_MHCRC = torch.stack([d[piece] for d in dscores], dim=-2)
            readers_MHCRK = torch.stack([x[piece] for x in readers], dim=-2)
            # As keys: from all their readers.
            from_readers_MHCCK = (dscores_MHCRC.mT @ readers_MHCRK).mul_(decay_MHCCK)
            dk[piece] = from_readers_MHCCK.sum(2)
            # As readers: from all their keys.
            faded_MHCCK = decay_MHCCK.mul_(k_MHCK[:, :, None])
            dreaders_MHCRK = dscores_MHCRC @ faded_MHCCK
            for dreader, piece_of_it in zip(dreaders, dreaders_MHCRK.unbind(-2), strict=True):
                dreader[piece] = piece_of_it
            dG[piece] = (readers_MHCRK * dreaders_MHCRK).sum(-2) - k_MHCK * dk[piece]
        return dk, dG, *dreaders


def _decay(G_MHCK: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(G_i - G_j) for j <= i, else 0: (M, H, C, C, K)."""
    C = G_MHCK.shape[2]
    later_CC1 = torch.ones(C, C, dtype=torch.bool, device=G_MHCK.device).triu(1)[..., None]
    # Masked before exp: above the diagonal the difference is positive and exp could overflow.
    between = (G_MHCK[:, :, :, None] - G_MHCK[:, :, None]).to(dtype)
    return between.masked_fill_(later_CC1, -torch.inf).exp_()


def _pieces(x_MHCK: Tensor) -> Iterator[slice]:
    M, _, C, _ = x_MHCK.shape
    step = max(1, PIECE // (x_MHCK[0].numel() * C))
    return (slice(first, first + step) for first in range(0, M, step))
