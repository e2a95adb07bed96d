"""Heads of the delta rules in plain torch: q and k are unit vectors.

Shapes: C channels of q, k and v in order, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def l2_normalize(x: Tensor) -> Tensor:
    """Divide x by its norm along the last axis; fp32 inside, x's dtype outside."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPS)).type_as(x)


def unit_heads(streams: Tensor, n_heads: int, key_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split (..., C) into q, k (..., H, K), divided by their norms, and v (..., H, V)."""
    keys = n_heads * key_dim
    sizes = [keys, keys, streams.shape[-1] - 2 * keys]
    q, k, v = (x.unflatten(-1, (n_heads, -1)) for x in streams.split(sizes, dim=-1))
    return l2_normalize(q), l2_normalize(k), v
