"""The short convolution token by token: the definition that the door is tested against.

Shapes: B batch, T tokens, N sequences, C channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def short_conv_naive(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """Same arguments and results as `short_conv`; fp64 inputs are computed in fp64."""
    dtype = torch.float64 if x_BTC.dtype == torch.float64 else torch.float32
    B, T, _ = x_BTC.shape
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    outputs = []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
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
        for back in range(k):  # the last tap weighs the current token
            weight_C = weight_CK[:, k - 1 - back]
            if t >= back:
                y_BC = y_BC + weight_C * x_BTC[:, t - back]
            elif past is not None:
                y_BC = y_BC + weight_C * past[:, k - 1 + t - back]
        outputs.append(y_BC)
    return outputs
