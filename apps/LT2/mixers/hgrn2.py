"""HGRN2 (https://arxiv.org/abs/2404.07904): a gated linear RNN whose state is expanded to a matrix.

    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T        o_t = S_t^T q_t K^-0.5

The forget gate f = b + (1 - b) sigmoid(.) decays the rows of the state, and what it leaves free is
the key: a row that keeps all writes nothing. q passes SiLU; all heads of the output are RMS-normed
together, and not gated. The paper learns a lower bound b for each layer, rising with depth from 0;
here it is an option, the same for all layers, since a looped layer stands at several depths.

Shapes: B sequences, T tokens, D model width, H heads, K key width (the paper's state expansion),
V value width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.LT2.kernel.gla import gla, gla_step
from apps.LT2.mixers.base import MixerArgs
from apps.LT2.mixers.linear import LinearMixer, Rest, head_shape
from apps.LT2.mixers.parts import GroupedRMSNorm
from lingua.errors import UserError
from lingua.parallel.tensor_parallel import TensorParallel
from lingua.transformer import init_linear


@dataclass
class HGRN2Args:
    n_heads: int | None = None  # heads; null = model.n_heads
    head_dim: int | None = None  # key width of a head, its state expansion; null = dim / n_heads
    expand_v: float = 1.0  # value width / key width; the state of a head is K x V
    lower_bound: float = 0.0  # of the forget gates, at least 0 and below 1

    def __post_init__(self) -> None:
        if not 0 <= self.lower_bound < 1:
            raise UserError(
                f"model.hgrn2.lower_bound={self.lower_bound} must be at least 0 and below 1"
            )


class HGRN2(LinearMixer):
    module_name = "hgrn2"
    by_outputs = ("wq", "wv", "wf")
    conv = None

    def __init__(self, shared: MixerArgs, own: HGRN2Args):
        super().__init__(shared, own)
        self.n_heads, self.key_dim, self.value_dim = head_shape(shared, own, "model.hgrn2")
        self.lower_bound = own.lower_bound
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        self.wq = nn.Linear(shared.dim, keys, bias=False)
        self.wv = nn.Linear(shared.dim, values, bias=False)  # the paper's input gate i
        self.wf = nn.Linear(shared.dim, keys, bias=False)  # forget gate
        self.wo = nn.Linear(values, shared.dim, bias=False)
        self.norm = GroupedRMSNorm(values, 1, shared.norm_eps)

    def split(self, tp: TensorParallel) -> None:
        super().split(tp)
        self.norm.split(tp)

    def projections(self) -> tuple[tuple[nn.Linear, ...], tuple[nn.Linear, ...]]:
        return (self.wq, self.wv), (self.wf,)

    def inputs(
        self, streams: Tensor, rest: Rest, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, v, g) by head; g is fp32."""
        q, v = streams.split([self.wq.out_features, self.wv.out_features], dim=-1)
        g, k = forget_gate(rest[0], self.lower_bound)
        q, k, g = (self.split_heads(x, self.key_dim) for x in (F.silu(q), k.type_as(v), g))
        return q, k, self.split_heads(v, self.value_dim), g

    def recurrence(
        self, *inputs: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return gla(*inputs, state=state, cu_seqlens=cu_seqlens)

    def recurrence_step(self, *inputs: Tensor, state_BHKV: Tensor) -> Tensor:
        return gla_step(*inputs, state_BHKV=state_BHKV)

    def output(self, o: Tensor, rest: Rest) -> Tensor:
        return self.wo(self.norm(o.flatten(-2)).type_as(o))

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        for linear in (self.wq, self.wv, self.wf):
            init_linear(linear, init_std)
        init_linear(self.wo, init_std, factor)
        self.norm.reset_parameters()

    def recurrence_flops(self) -> int:
        # Write the outer product, read q^T S: 2 K V each; and K V for the decay.
        return 5 * self.n_heads * self.key_dim * self.value_dim


def forget_gate(x: Tensor, lower_bound: float) -> tuple[Tensor, Tensor]:
    """(log f, 1 - f) in fp32 of f = b + (1 - b) sigmoid(x), each without a loss of digits."""
    x = x.float()
    complement = (1 - lower_bound) * torch.sigmoid(-x)
    if lower_bound == 0:
        return F.logsigmoid(x), complement
    # The sum of b and (1 - b) sigmoid(x) is right near b, and 1 minus the complement near 1.
    log_bound = torch.full_like(x, math.log(lower_bound))
    near_bound = torch.logaddexp(log_bound, F.logsigmoid(x) + math.log1p(-lower_bound))
    near_one = torch.log1p(-complement.clamp(max=0.5))
    return torch.where(complement < 0.5, near_one, near_bound), complement
