"""HGRN2 (https://arxiv.org/abs/2404.07904): a gated linear RNN with a matrix state.

    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T        o_t = S_t^T q_t K^-0.5

The forget gate f = b + (1 - b) sigmoid(.) decays the rows of the state, and 1 - f is the key: a row
that keeps everything writes nothing. q passes SiLU. All heads of the output share one RMSNorm,
without a gate. The paper learns a lower bound b per layer that rises with depth. Here b is an
option, the same for all layers, because a looped layer runs at several depths.

Shapes: B sequences, T tokens, H heads, K key dim (the paper's state expansion), V value dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.LT2.kernel.gla import gla, gla_step
from apps.LT2.mixers.base import MixerArgs
from apps.LT2.mixers.linear import LinearMixer, Tensors, head_shape
from apps.LT2.mixers.parts import GroupedRMSNorm
from lingua.errors import UserError


@dataclass
class HGRN2Args:
    n_heads: int | None = None  # heads; null = model.n_heads
    head_dim: int | None = None  # key dim of a head, its state expansion; null = dim / n_heads
    expand_v: float = 1.0  # value dim / key dim; the state of a head is K x V
    lower_bound: float = 0.0  # of the forget gates, at least 0 and below 1

    def __post_init__(self) -> None:
        if not 0 <= self.lower_bound < 1:
            raise UserError(
                f"model.hgrn2.lower_bound={self.lower_bound} must be at least 0 and below 1"
            )


class HGRN2(LinearMixer):
    module_name = "hgrn2"
    stream_linears = ("wq", "wv")
    rest_linears = ("wf",)
    recurrence = staticmethod(gla)
    recurrence_step = staticmethod(gla_step)
    state_flops = 5  # write the outer product, read q^T S: 2 each; and the decay
    conv = None

    def __init__(self, shared: MixerArgs, own: HGRN2Args):
        super().__init__()
        self.n_heads, self.key_dim, self.value_dim = head_shape(shared, own, "model.hgrn2")
        self.lower_bound = own.lower_bound
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        self.wq = nn.Linear(shared.dim, keys, bias=False)
        self.wv = nn.Linear(shared.dim, values, bias=False)  # the paper's input gate i
        self.wf = nn.Linear(shared.dim, keys, bias=False)  # forget gate
        self.wo = nn.Linear(values, shared.dim, bias=False)
        self.norm = GroupedRMSNorm(values, 1, shared.output_norm_eps)

    def inputs(self, streams: Tensor, rest: Tensors, positions: Tensor | None) -> Tensors:
        """Return (q, k, v, g) by head; g (..., H, K) is fp32."""
        q, v = streams.split([self.wq.out_features, self.wv.out_features], dim=-1)
        g, k = forget_gate(rest[0], self.lower_bound)
        q, k, g = (self.split_heads(x, self.key_dim) for x in (F.silu(q), k.type_as(v), g))
        return q, k, self.split_heads(v, self.value_dim), g

    def output(self, o: Tensor, streams: Tensor, rest: Tensors) -> Tensor:
        return self.norm(o.flatten(-2)).type_as(o)


def forget_gate(x: Tensor, lower_bound: float) -> tuple[Tensor, Tensor]:
    """Return (log f, 1 - f) in fp32 of f = b + (1 - b) sigmoid(x), without cancellation."""
    x = x.float()
    complement = (1 - lower_bound) * torch.sigmoid(-x)
    if lower_bound == 0:
        return F.logsigmoid(x), complement
    # Near b the sum of b and (1 - b) sigmoid(x) is accurate, near 1 the complement is.
    log_bound = torch.full_like(x, math.log(lower_bound))
    near_bound = torch.logaddexp(log_bound, F.logsigmoid(x) + math.log1p(-lower_bound))
    near_one = torch.log1p(-complement.clamp(max=0.5))
    return torch.where(complement < 0.5, near_one, near_bound), complement
