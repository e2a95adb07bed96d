"""Mamba-2 (https://arxiv.org/abs/2405.21060): a state space model with one decay a head.

    S_t = exp(A dt_t) S_{t-1} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + D x_t

B and C are shared by the heads of a group. x, B and C pass a short convolution with bias and SiLU;
dt = softplus(. + dt_bias). The gate comes before the norm: RMSNorm(y SiLU(z)), over the heads of a
group together. Shapes: B sequences, T tokens, D model width, H heads, G groups, K width of B and C,
V width of a head of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.LT2.kernel.simple_gla import simple_gla, simple_gla_step
from apps.LT2.mixers.base import MixerArgs
from apps.LT2.mixers.linear import LinearMixer, Rest
from apps.LT2.mixers.parts import GroupedRMSNorm, ShortConv, init_decay
from lingua.errors import UserError
from lingua.parallel.tensor_parallel import TensorParallel
from lingua.transformer import check_sizes, init_linear


@dataclass
class Mamba2Args:
    expand: float = 2.0  # width of x and z / dim
    head_dim: int = 64  # width of a head of x; there are expand * dim / head_dim heads
    state_dim: int = 128  # width of B and C; the state of a head is state_dim x head_dim
    n_groups: int = 1  # groups of heads that share B and C
    conv_size: int = 4  # taps of the short causal convolutions on x, B and C; 0 = none


class Mamba2(LinearMixer):
    module_name = "mamba2"
    reads = frozenset()  # its heads come from expand and head_dim
    by_outputs = ("wx", "wB", "wC", "wz", "wdt")
    conv: ShortConv

    def __init__(self, shared: MixerArgs, own: Mamba2Args):
        super().__init__(shared, own)
        self.n_heads, self.n_groups = head_counts(shared, own)
        self.key_dim, self.value_dim = own.state_dim, own.head_dim
        inner, state_inputs = self.n_heads * self.value_dim, self.n_groups * self.key_dim
        self.wx = nn.Linear(shared.dim, inner, bias=False)
        self.wB = nn.Linear(shared.dim, state_inputs, bias=False)
        self.wC = nn.Linear(shared.dim, state_inputs, bias=False)
        self.wz = nn.Linear(shared.dim, inner, bias=False)  # output gate
        self.wdt = nn.Linear(shared.dim, self.n_heads, bias=False)  # time steps
        self.wo = nn.Linear(inner, shared.dim, bias=False)
        self.conv = ShortConv(
            inner + 2 * state_inputs, own.conv_size, option="model.mamba2.conv_size", bias=True
        )
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GroupedRMSNorm(inner, self.n_groups, shared.norm_eps)
        self.gathers_group = False  # whether ranks of tensor parallelism share the one group

    def split_counts(self) -> dict[str, int]:
        counts = {"the heads (model.mamba2.expand * model.dim / head_dim)": self.n_heads}
        if self.n_groups == 1:
            return counts | {"the width of B and C (model.mamba2.state_dim)": self.key_dim}
        return counts | {"the groups (model.mamba2.n_groups, if not 1)": self.n_groups}

    def stream_widths(self) -> list[tuple[int, bool]]:
        shared, splits = self.n_groups * self.key_dim, self.n_groups > 1
        return [(self.n_heads * self.value_dim, True), (shared, splits), (shared, splits)]

    def split(self, tp: TensorParallel) -> None:
        super().split(tp)
        self.norm.split(tp)
        if self.n_groups == 1:
            self.gathers_group = True
        else:
            self.n_groups //= tp.size

    def projections(self) -> tuple[tuple[nn.Linear, ...], tuple[nn.Linear, ...]]:
        return (self.wx, self.wB, self.wC), (self.wz, self.wdt)

    def project(self, x: Tensor) -> tuple[Tensor, Rest]:
        streams, rest = super().project(x)
        if self.gathers_group:
            x, B, C = streams.split([m.out_features for m in (self.wx, self.wB, self.wC)], dim=-1)
            streams = torch.cat((x, self.tp.all_gather(B), self.tp.all_gather(C)), dim=-1)
        return streams, rest

    def inputs(
        self, streams: Tensor, rest: Rest, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (..., G, K), k (..., G, K), v (..., H, V) and g (..., H), which is fp32."""
        x, B, C = self._split(streams)
        B, C = (y.unflatten(-1, (self.n_groups, self.key_dim)) for y in (B, C))
        dt = F.softplus(rest[1].float() + self.tp.own(self.dt_bias).float())
        g = -self.tp.own(self.A_log).float().exp() * dt
        v = (x.float() * dt[..., None]).type_as(x)
        return C, B, v, g

    def recur(self, streams: Tensor, rest: Rest, **past: Any) -> tuple[Tensor, Tensor]:
        o, state = super().recur(streams, rest, **past)
        return self._skip(o, streams), state

    def recur_step(self, streams: Tensor, rest: Rest, **past: Any) -> Tensor:
        return self._skip(super().recur_step(streams, rest, **past), streams)

    def recurrence(
        self, *inputs: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return simple_gla(*inputs, scale=1.0, state=state, cu_seqlens=cu_seqlens)

    def recurrence_step(self, *inputs: Tensor, state_BHKV: Tensor) -> Tensor:
        return simple_gla_step(*inputs, state_BHKV=state_BHKV, scale=1.0)

    def output(self, o: Tensor, rest: Rest) -> Tensor:
        gated = o.flatten(-2).float() * F.silu(rest[0].float())
        return self.wo(self.norm(gated).type_as(o))

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        for linear in (self.wx, self.wB, self.wC, self.wz, self.wdt):
            init_linear(linear, init_std)
        init_linear(self.wo, init_std, factor)
        self.conv.reset_parameters()
        init_decay(self.A_log, self.dt_bias, least_A=1.0)
        nn.init.ones_(self.D)
        self.norm.reset_parameters()

    def recurrence_flops(self) -> int:
        # Write the outer product, read C^T S: 2 K V each; K V for the decay; and D x.
        return self.n_heads * self.value_dim * (5 * self.key_dim + 2)

    def _skip(self, o: Tensor, streams: Tensor) -> Tensor:
        """o + D x, by head."""
        x, _, _ = self._split(streams)
        return (o + x.float() * self.tp.own(self.D).float()[:, None]).type_as(o)

    def _split(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., H, V), B and C (..., G * K)"""
        inner, shared = self.n_heads * self.value_dim, self.n_groups * self.key_dim
        x, B, C = streams.split([inner, shared, shared], dim=-1)
        return self.split_heads(x, self.value_dim), B, C


def head_counts(shared: MixerArgs, own: Mamba2Args) -> tuple[int, int]:
    """(heads, groups) of `model.mamba2`; UserError where they are no whole numbers."""
    check_sizes("model.mamba2", own, "head_dim", "state_dim", "n_groups")
    n_heads = own.expand * shared.dim / own.head_dim
    if n_heads < 1 or n_heads != int(n_heads):
        raise UserError(
            f"model.mamba2.head_dim={own.head_dim} does not divide the inner width: "
            f"model.mamba2.expand * model.dim = {own.expand:g} * {shared.dim}"
        )
    if n_heads % own.n_groups:
        raise UserError(
            f"model.mamba2.n_groups={own.n_groups} does not divide the {int(n_heads)} heads "
            "(expand * dim / head_dim)"
        )
    return int(n_heads), own.n_groups
