"""Scores of queries with earlier keys under a decay per key channel.

    score_ij = sum_c x_ic k_jc exp(G_ic - G_jc)  for j <= i, else 0        G: g summed in the chunk

Split into exp(G_i) and exp(-G_j) this is a matrix product, but exp(-G_j) overflows after strong
decay. So the decay of each pair is computed: C x C x K numbers per chunk, never kept, for few
chunks at a time, so they stay in the processor's cache.

Shapes: M chunks of all sequences, H heads, C tokens in a chunk, K key head dim, R readers x of the
same keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MAX_DECAYS = 2**18  # computed at a time: 1 MiB in fp32


class DecayedScores(torch.autograd.Function):
    """apply(k, G, *readers) -> the scores (M, H, C, C) of each reader with the keys.

    k and each reader (M, H, C, K); G (M, H, C, K) in fp64, not rising along C. Differentiable once.
    The gradient of G needs no C x C x K numbers: score_ij passes to G_ic what it passes to x_ic,
    times x_ic, and to -G_jc what it passes to k_jc, times k_jc.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, G: Tensor, *readers: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(k, G, *readers)
        scores = k.new_empty(*k.shape[:3], k.shape[2], len(readers))
        for part in _parts(k):
            readers_MHCKR = torch.stack([x[part] for x in readers], dim=-1)
            decayed_MHCCK = _decay(G[part], k.dtype).mul_(k[part][:, :, None])
            torch.matmul(decayed_MHCCK, readers_MHCKR, out=scores[part])
        return scores.unbind(-1)

    @staticmethod
    def backward(ctx: Any, *dscores: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        k, G, *readers = ctx.saved_tensors
        dk, dG = torch.empty_like(k), torch.empty_like(G)
        dreaders = [torch.empty_like(k) for _ in readers]
        for part in _parts(k):
            k_MHCK = k[part]
            decay_MHCCK = _decay(G[part], k.dtype)
            dscores_MHCRC = torch.stack([d[part] for d in dscores], dim=-2)
            readers_MHCRK = torch.stack([x[part] for x in readers], dim=-2)
            # As keys: from all their readers.
            from_readers_MHCCK = (dscores_MHCRC.mT @ readers_MHCRK).mul_(decay_MHCCK)
            dk[part] = from_readers_MHCCK.sum(2)
            # As readers: from all their keys.
            decayed_MHCCK = decay_MHCCK.mul_(k_MHCK[:, :, None])
            dreaders_MHCRK = dscores_MHCRC @ decayed_MHCCK
            for dreader, d_part in zip(dreaders, dreaders_MHCRK.unbind(-2), strict=True):
                dreader[part] = d_part
            dG[part] = (readers_MHCRK * dreaders_MHCRK).sum(-2) - k_MHCK * dk[part]
        return dk, dG, *dreaders


def _decay(G_MHCK: Tensor, dtype: torch.dtype) -> Tensor:
    """Return exp(G_i - G_j) for j <= i, else 0: (M, H, C, C, K)."""
    C = G_MHCK.shape[2]
    later_CC1 = torch.ones(C, C, dtype=torch.bool, device=G_MHCK.device).triu(1)[..., None]
    # Mask before exp: above the diagonal exp could overflow.
    between = (G_MHCK[:, :, :, None] - G_MHCK[:, :, None]).to(dtype)
    return between.masked_fill_(later_CC1, -torch.inf).exp_()


def _parts(x_MHCK: Tensor) -> Iterator[slice]:
    M, _, C, _ = x_MHCK.shape
    step = max(1, MAX_DECAYS // (x_MHCK[0].numel() * C))
    return (slice(first, first + step) for first in range(0, M, step))
