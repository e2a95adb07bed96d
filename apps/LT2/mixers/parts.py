"""Pieces that several linear mixers share: short convolution, head norms, decay parameters.

Shapes: B sequences, T tokens, C channels, H heads, V width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.LT2.kernel.short_conv import conv_state, short_conv, short_conv_step
from lingua.errors import UserError
from lingua.parallel.tensor_parallel import ALONE, TensorParallel


class ShortConv(nn.Module):
    """Causal depthwise convolution of `size` taps followed by SiLU; size 0 leaves only the SiLU."""

    def __init__(self, channels: int, size: int, *, option: str, bias: bool = False):
        super().__init__()
        if size != 0 and not 2 <= size <= 8:
            raise UserError(f"{option}={size} must be 2 to 8 taps, or 0 for no convolution")
        self.channels, self.size = channels, size
        self.own: list[slice] | None = None  # a rank's channels under tensor parallelism
        self.weight = nn.Parameter(torch.empty(channels, size)) if size else None
        self.bias = nn.Parameter(torch.empty(channels)) if size and bias else None

    @property
    def n_tail(self) -> int:
        """Past inputs that the next token needs."""
        return max(self.size - 1, 0)

    def forward(
        self, x_BTC: Tensor, *, tail: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """`tail` (N, size - 1, C): the inputs before x of each sequence, else zeros."""
        if self.weight is None:
            return F.silu(x_BTC)
        weight, bias = self._own_taps()
        return short_conv(x_BTC, weight, bias, state=tail, cu_seqlens=cu_seqlens)

    def next_tail(
        self, x_BTC: Tensor, *, tail: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The tail (N, n_tail, C) that a later call needs to go on after x."""
        if self.weight is None:
            return x_BTC.new_zeros(0) if tail is None else tail
        return conv_state(x_BTC, self.size, state=tail, cu_seqlens=cu_seqlens)

    def step(self, x_BC: Tensor, tail_BKC: Tensor) -> Tensor:
        """One token a row; `tail_BKC` is moved on in place."""
        if self.weight is None:
            return F.silu(x_BC)
        weight, bias = self._own_taps()
        return short_conv_step(x_BC, weight, tail_BKC, bias)

    def split(self, tp: TensorParallel, widths: list[tuple[int, bool]]) -> None:
        """Convolve this rank's channels alone: of parts that lie side by side, each (channels,
        whether the ranks share them out), its share or all."""
        assert sum(width for width, _ in widths) == self.channels
        self.own, start = [], 0
        for width, shared_out in widths:
            n_own = width // tp.size if shared_out else width
            first = start + (tp.rank * n_own if shared_out else 0)
            self.own.append(slice(first, first + n_own))
            start += width
        self.channels = sum(part.stop - part.start for part in self.own)

    def _own_taps(self) -> tuple[Tensor, Tensor | None]:
        assert self.weight is not None
        if self.own is None:
            return self.weight, self.bias
        weight, bias = self.weight, self.bias
        own_bias = None if bias is None else torch.cat([bias[part] for part in self.own])
        return torch.cat([weight[part] for part in self.own]), own_bias

    def reset_parameters(self) -> None:
        """nn.Conv1d's uniform range, for one input channel and `size` taps."""
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                bound = self.size**-0.5
                nn.init.uniform_(parameter, -bound, bound)


class HeadRMSNorm(nn.Module):
    """RMSNorm over each head (..., head_dim), with one weight for all heads; fp32 inside."""

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self._normalize(x).type_as(x)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def _normalize(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide * scale * self.weight.float()


class GroupedRMSNorm(nn.Module):
    """RMSNorm of each group of channels, with a weight for every channel; fp32 inside and out."""

    def __init__(self, channels: int, n_groups: int, eps: float):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.tp, self.shared_by = ALONE, 1  # ranks that each hold a part of the one group

    def split(self, tp: TensorParallel) -> None:
        """Take this rank's groups, or its part of the one group."""
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


GATE_ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


class GatedRMSNorm(HeadRMSNorm):
    """The same, times an activation of a gate: "silu" or "sigmoid"."""

    def __init__(self, head_dim: int, eps: float, activation: str = "silu"):
        super().__init__(head_dim, eps)
        self.activation = GATE_ACTIVATIONS[activation]

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return (self._normalize(x) * self.activation(gate.float())).type_as(x)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / |x| along the last axis; fp32 inside, x's dtype outside."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).type_as(x)


def write_strength(b: Tensor, allow_neg_eigval: bool) -> Tensor:
    """beta = sigmoid(b), or twice that, in fp32: at 2 a write flips what its key held."""
    beta = torch.sigmoid(b.float())
    return 2 * beta if allow_neg_eigval else beta


@torch.no_grad()
def init_decay(A_log: Tensor, dt_bias: Tensor, *, least_A: float = 0.0) -> None:
    """Mamba-style decay g = -exp(A_log) softplus(a + dt_bias), https://arxiv.org/abs/2405.21060.

    A is uniform in (least_A, 16), and softplus(dt_bias) log-uniform in (0.001, 0.1): memories of
    about one to some thousand tokens.
    """
    A_log.uniform_(least_A, 16).clamp_(min=1e-4).log_()
    dt = torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus


def log_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """-exp(A_log) softplus(a + dt_bias), fp32 and never positive; the two broadcast to a."""
    return -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
