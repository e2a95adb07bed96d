"""Parts that the layers of several papers share, for one sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(x_TC: Tensor, conv) -> Tensor:
    """Convolve depthwise and causally, with the last weight on the current token; then SiLU."""
    if conv.weight is None:
        return F.silu(x_TC)
    padded_CT = F.pad(x_TC.T, (conv.size - 1, 0))
    return F.silu(F.conv1d(padded_CT[None], conv.weight[:, None], groups=x_TC.shape[1])[0].T)


def convolved_heads(layer, x_TD: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (q (T, K), k (T, K), v (T, V)) of each head; q and k are unit vectors."""
    streams_TC = torch.cat([x_TD @ w.weight.T for w in (layer.wq, layer.wk, layer.wv)], dim=-1)
    keys, values = layer.n_heads * layer.key_dim, layer.n_heads * layer.value_dim
    q_TC, k_TC, v_TC = convolve(streams_TC, layer.conv).split([keys, keys, values], dim=-1)
    heads = zip(*(x.chunk(layer.n_heads, dim=-1) for x in (q_TC, k_TC, v_TC)), strict=True)
    return [(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v) for q, k, v in heads]
