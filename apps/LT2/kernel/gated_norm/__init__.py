"""RMSNorm of each head times an activation of a gate, after the recurrences.

    y = x / rms(x) * weight * silu(gate)        or sigmoid(gate)

Plain torch, except in training on CUDA: compiled, its backward reads x, gate and dy twice and runs
far below the memory's bandwidth. There one Triton kernel computes forward, and one backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.gated_norm.fused import gated_norm_fused, kernel_supports
from apps.LT2.kernel.gated_norm.naive import ACTIVATIONS, gated_norm_naive


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """Return y (..., V) in x's dtype for x and gate (..., V) and weight (V,); fp32 inside.

    activation  "silu" or "sigmoid"
    Differentiable in x, gate and weight.
    """
    assert activation in ACTIVATIONS, f"activation must be one of {[*ACTIVATIONS]}"
    if torch.is_grad_enabled() and kernel_supports(x, gate):
        return gated_norm_fused(x, gate, weight, eps, activation == "silu")
    return gated_norm_naive(x, gate, weight, eps, activation)
