"""Parts that several mixers share: short convolution, norms, decay.

Shapes: B sequences, T tokens, N sequences of a packed call, C channels, H heads, V value dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.LT2.kernel.decode_linear import Weight
from apps.LT2.kernel.gated_norm import gated_norm
from apps.LT2.kernel.short_conv import (
    conv_state,
    short_conv,
    short_conv_step,
    short_conv_unit_heads,
)
from apps.LT2.kernel.short_conv.heads import unit_heads
from lingua.errors import UserError
from lingua.parallel.tensor_parallel import ALONE, TensorParallel
from lingua.transformer import RMSNorm, fused_weight


def decode_weight(linears: Sequence[nn.Linear]) -> Weight | None:
    """Return the weight that decode steps read for these linears.

    None if it isn't prepared (apps.LT2.inference.load), or if they have a bias.
    """
    matrix, first = fused_weight(linears), linears[0]
    if matrix is None or any(linear.bias is not None for linear in linears):
        return None
    return Weight(matrix, getattr(first, "int8_weight", None), getattr(first, "int8_scale", None))


class ShortConv(nn.Module):
    """Causal depthwise convolution of kernel size `size`, then SiLU. Size 0 is SiLU alone."""

    def __init__(self, channels: int, size: int, *, option: str, bias: bool = False):
        super().__init__()
        if size != 0 and not 2 <= size <= 8:
            raise UserError(f"{option}={size} must be 2 to 8, or 0 for no convolution")
        self.channels, self.size = channels, size
        self.own: list[slice] | None = None  # a rank's channels under tensor parallelism
        self.weight = nn.Parameter(torch.empty(channels, size)) if size else None
        self.bias = nn.Parameter(torch.empty(channels)) if size and bias else None

    @property
    def state_len(self) -> int:
        """Past inputs that the next token needs."""
        return max(self.size - 1, 0)

    def forward(
        self, x_BTC: Tensor, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Convolve x after `state` (N, state_len, C), the inputs before it, zeros if None."""
        if self.weight is None:
            return F.silu(x_BTC)
        weight, bias = self._own_weight()
        return short_conv(x_BTC, weight, bias, state=state, cu_seqlens=cu_seqlens)

    def unit_heads(
        self, x_BTC: Tensor, n_heads: int, key_dim: int, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve x from zeros; return q and k of unit norm, and v, by head."""
        if self.weight is None:
            return unit_heads(F.silu(x_BTC), n_heads, key_dim)
        weight, bias = self._own_weight()
        assert bias is None
        return short_conv_unit_heads(x_BTC, weight, n_heads, key_dim, cu_seqlens=cu_seqlens)

    def next_state(self, x_BTC: Tensor, state: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the state (N, state_len, C) after x."""
        if self.weight is None:
            return state
        return conv_state(x_BTC, self.size, state=state, cu_seqlens=cu_seqlens)

    def step(self, x_BC: Tensor, state_BKC: Tensor) -> Tensor:
        """Convolve one token of each row; the state is updated in place."""
        if self.weight is None:
            return F.silu(x_BC)
        weight, bias = self._own_weight()
        return short_conv_step(x_BC, weight, state_BKC, bias)

    def split(self, tp: TensorParallel, channels: Sequence[tuple[int, bool]]) -> None:
        """Keep this rank's channels, in place.

        channels: consecutive groups of channels, (number, whether ranks share them or each has all)
        """
        assert sum(n for n, _ in channels) == self.channels
        self.own, start = [], 0
        for n, shared_out in channels:
            n_own = n // tp.size if shared_out else n
            first = start + (tp.rank * n_own if shared_out else 0)
            self.own.append(slice(first, first + n_own))
            start += n
        self.channels = sum(part.stop - part.start for part in self.own)

    def _own_weight(self) -> tuple[Tensor, Tensor | None]:
        assert self.weight is not None
        weight, bias = self.weight, self.bias
        if self.own is None:
            return weight, bias
        own_bias = None if bias is None else torch.cat([bias[part] for part in self.own])
        return torch.cat([weight[part] for part in self.own]), own_bias

    def reset_parameters(self) -> None:
        """Draw from nn.Conv1d's uniform range for one input channel."""
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                bound = self.size**-0.5
                nn.init.uniform_(parameter, -bound, bound)


class GroupedRMSNorm(nn.Module):
    """RMSNorm of each group of channels, with a weight per channel; fp32 inside and out."""

    def __init__(self, channels: int, n_groups: int, eps: float):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.tp, self.shared_by = ALONE, 1  # ranks that each hold a part of the one group

    def split(self, tp: TensorParallel) -> None:
        """Keep this rank's groups, or its part of the one group, in place."""
        self.tp = tp
        if self.n_groups == 1:
            self.shared_by = tp.size
        else:
            self.n_groups //= tp.size

    def forward(self, x: Tensor) -> Tensor:
        groups = x.float().unflatten(-1, (self.n_groups, -1))
        mean_square = groups.square().mean(-1, keepdim=True)
        if self.shared_by > 1:
            mean_square = self.tp.all_reduce(mean_square) / self.shared_by
        scale = torch.rsqrt(mean_square + self.eps)
        return (groups * scale).flatten(-2) * self.tp.own(self.weight).float()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class GatedRMSNorm(RMSNorm):
    """RMSNorm times an activation of a gate, "silu" or "sigmoid"; fp32 inside."""

    def __init__(self, dim: int, eps: float, activation: str = "silu"):
        super().__init__(dim, eps)
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gated_norm(x, gate, self.weight, self.eps, self.activation)


def write_strength(b: Tensor, allow_neg_eigval: bool) -> Tensor:
    """Return beta = sigmoid(b) in fp32, or twice that: at 2 a write negates what its key held."""
    beta = torch.sigmoid(b.float())
    return 2 * beta if allow_neg_eigval else beta


@torch.no_grad()
def init_decay(A_log: Tensor, dt_bias: Tensor, *, least_A: float = 0.0) -> None:
    """Initialize the decay of Mamba-2, https://arxiv.org/abs/2405.21060, in place.

    A is uniform in (least_A, 16), softplus(dt_bias) log-uniform in (0.001, 0.1): a state remembers
    one to some thousand tokens.
    """
    A_log.uniform_(least_A, 16).clamp_(min=1e-4).log_()
    dt = torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus


def log_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Return -exp(A_log) softplus(a + dt_bias) in fp32, never positive; both broadcast to a."""
    return -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
