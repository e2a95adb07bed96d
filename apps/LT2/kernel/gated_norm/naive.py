"""RMSNorm times an activation of a gate in plain torch: the definition, and the CPU path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def gated_norm_naive(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str
) -> Tensor:
    """Compute `gated_norm`."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float() * ACTIVATIONS[activation](gate.float())).type_as(x)
