"""Mamba-2 (https://arxiv.org/abs/2405.21060): a state space model with one decay per head.

    S_t = exp(A dt_t) S_{t-1} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + D x_t

C is not scaled by K^-0.5. Heads of a group share B and C. x, B and C pass a short convolution with
bias and SiLU; dt = softplus(. + dt_bias). The gate comes before the norm: RMSNorm(y SiLU(z)) over
all heads of a group. Shapes: B sequences, T tokens, H heads, G groups, K dim of B and C, V dim of a
head of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.LT2.kernel.simple_gla import simple_gla, simple_gla_step
from apps.LT2.mixers.base import MixerArgs, TensorParallelPlan
from apps.LT2.mixers.linear import LinearMixer, Tensors
from apps.LT2.mixers.parts import GroupedRMSNorm, ShortConv, init_decay
from lingua.errors import UserError
from lingua.transformer import check_sizes


@dataclass
class Mamba2Args:
    expand: float = 2.0  # dim of x and z / model.dim
    head_dim: int = 64  # dim of a head of x; there are expand * dim / head_dim heads
    state_dim: int = 128  # dim of B and C; the state of a head is state_dim x head_dim
    n_groups: int = 1  # groups of heads that share B and C
    conv_size: int = 4  # kernel size of the convolutions on x, B and C; 0 = none


class Mamba2(LinearMixer):
    module_name = "mamba2"
    reads = LinearMixer.reads - {"n_heads"}  # its heads come from expand and head_dim
    stream_linears = ("wx", "wB", "wC")
    rest_linears = ("wz", "wdt")
    recurrence = staticmethod(partial(simple_gla, scale=1.0))
    recurrence_step = staticmethod(partial(simple_gla_step, scale=1.0))
    state_flops = 5  # write the outer product, read C^T S: 2 each; and the decay
    conv: ShortConv

    def __init__(self, shared: MixerArgs, own: Mamba2Args):
        super().__init__()
        self.n_heads, self.n_groups = head_counts(shared, own)
        self.key_dim, self.value_dim = own.state_dim, own.head_dim
        inner, grouped = self.n_heads * self.value_dim, self.n_groups * self.key_dim
        self.wx = nn.Linear(shared.dim, inner, bias=False)
        self.wB = nn.Linear(shared.dim, grouped, bias=False)
        self.wC = nn.Linear(shared.dim, grouped, bias=False)
        self.wz = nn.Linear(shared.dim, inner, bias=False)  # output gate
        self.wdt = nn.Linear(shared.dim, self.n_heads, bias=False)  # time steps
        self.wo = nn.Linear(inner, shared.dim, bias=False)
        self.conv = ShortConv(
            inner + 2 * grouped, own.conv_size, option="model.mamba2.conv_size", bias=True
        )
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GroupedRMSNorm(inner, self.n_groups, shared.output_norm_eps)

    def expand(self, streams: Tensor, rest: Tensors) -> tuple[Tensor, Tensors]:
        if self.wB.out_features < self.key_dim:  # tensor-parallel ranks share the one group
            x, B, C = streams.split([m.out_features for m in (self.wx, self.wB, self.wC)], dim=-1)
            streams = torch.cat((x, self.tp.all_gather(B), self.tp.all_gather(C)), dim=-1)
        return streams, rest

    def inputs(self, streams: Tensor, rest: Tensors, positions: Tensor | None) -> Tensors:
        """Return C and B (..., G, K), dt x (..., H, V) and the fp32 log decay (..., H)."""
        x, B, C = self._split(streams)
        B, C = (y.unflatten(-1, (self.n_groups, self.key_dim)) for y in (B, C))
        dt = F.softplus(rest[1].float() + self.tp.own(self.dt_bias).float())
        g = -self.tp.own(self.A_log).float().exp() * dt
        return C, B, (x.float() * dt[..., None]).type_as(x), g

    def output(self, o: Tensor, streams: Tensor, rest: Tensors) -> Tensor:
        x, _, _ = self._split(streams)
        y = (o + x.float() * self.tp.own(self.D).float()[:, None]).type_as(o)
        gated = y.flatten(-2).float() * F.silu(rest[0].float())
        return self.norm(gated).type_as(o)

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        super().reset_parameters(init_std, factor)
        init_decay(self.A_log, self.dt_bias, least_A=1.0)
        nn.init.ones_(self.D)

    def flops_per_token(self, seqlen: int, window: int | None = None) -> int:
        skip = 2 * self.n_heads * self.value_dim  # D x
        return super().flops_per_token(seqlen, window) + skip

    def tp_plan(self) -> TensorParallelPlan:
        one_group, grouped = self.n_groups == 1, self.n_groups * self.key_dim
        divides = {"the heads (model.mamba2.expand * model.dim / head_dim)": self.n_heads}
        if one_group:
            divides["the dim of B and C (model.mamba2.state_dim)"] = self.key_dim
        else:
            divides["the groups (model.mamba2.n_groups, if not 1)"] = self.n_groups
        return TensorParallelPlan(
            divides,
            heads=("n_heads",) if one_group else ("n_heads", "n_groups"),
            conv_channels=(
                (self.n_heads * self.value_dim, True),
                (grouped, not one_group),
                (grouped, not one_group),
            ),
        )

    def _split(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x (..., H, V), B and C (..., G * K)."""
        inner, grouped = self.n_heads * self.value_dim, self.n_groups * self.key_dim
        x, B, C = streams.split([inner, grouped, grouped], dim=-1)
        return self.split_heads(x, self.value_dim), B, C


def head_counts(shared: MixerArgs, own: Mamba2Args) -> tuple[int, int]:
    """Return (heads, groups); UserError unless they are whole numbers."""
    check_sizes("model.mamba2", own, "head_dim", "state_dim", "n_groups")
    n_heads = own.expand * shared.dim / own.head_dim
    if n_heads < 1 or n_heads != int(n_heads):
        raise UserError(
            f"model.mamba2.head_dim={own.head_dim} must divide model.mamba2.expand * model.dim = "
            f"{own.expand:g} * {shared.dim}"
        )
    if n_heads % own.n_groups:
        raise UserError(
            f"model.mamba2.n_groups={own.n_groups} must divide the {int(n_heads)} heads, "
            "model.mamba2.expand * model.dim / head_dim"
        )
    return int(n_heads), own.n_groups
