"""The definition of the short convolution, token by token.

Shapes: B batch, T tokens, N sequences, C channels, K kernel size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from apps.LT2.kernel.arguments import wide_dtype


def short_conv_naive(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """Run `short_conv` in fp32, or in fp64 for fp64 inputs."""
    dtype = wide_dtype(x_BTC.dtype)
    B, T, _ = x_BTC.shape
    offsets = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    outputs = []
    for n, (start, end) in enumerate(pairwise(offsets)):
        rows = slice(0, B) if cu_seqlens is None else slice(n, n + 1)
        past = None if state is None else state[rows].to(dtype)
        outputs += _sequence(x_BTC[:, start:end].to(dtype), weight_CK.to(dtype), past)
    y_BTC = torch.stack(outputs, dim=1)
    if bias_C is not None:
        y_BTC = y_BTC + bias_C.to(dtype)
    if activation == "silu":
        y_BTC = y_BTC * torch.sigmoid(y_BTC)
    return y_BTC.to(x_BTC.dtype)


def _sequence(x_BTC: Tensor, weight_CK: Tensor, past: Tensor | None) -> list[Tensor]:
    k = weight_CK.shape[1]
    outputs = []
    for t in range(x_BTC.shape[1]):
        y_BC = torch.zeros_like(x_BTC[:, 0])
        for back in range(k):  # the last weight applies to the current token
            weight_C = weight_CK[:, k - 1 - back]
            if t >= back:
                y_BC = y_BC + weight_C * x_BTC[:, t - back]
            elif past is not None:
                y_BC = y_BC + weight_C * past[:, k - 1 + t - back]
        outputs.append(y_BC)
    return outputs
