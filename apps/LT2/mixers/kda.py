"""Kimi Delta Attention (https://arxiv.org/abs/2510.26692): the delta rule with a learned decay
per key channel.

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T    o_t = S_t^T q_t K^-0.5

q, k and v pass a short convolution and SiLU; q and k are unit vectors. The output is RMS-normed
per head and gated by a sigmoid. Decay and gate are low-rank projections whose rank is the value
dim of a head. Shapes: B sequences, T tokens, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.LT2.kernel.kda import kda, kda_step
from apps.LT2.mixers.base import MixerArgs, TensorParallelPlan
from apps.LT2.mixers.linear import LinearMixer, Tensors, head_shape
from apps.LT2.mixers.parts import (
    GatedRMSNorm,
    ShortConv,
    init_decay,
    log_decay,
    write_strength,
)
from lingua.transformer import init_linear


@dataclass
class KDAArgs:
    n_heads: int | None = None  # heads; null = model.n_heads
    head_dim: int | None = None  # key dim of a head; null = dim / n_heads
    # value dim / key dim; the state of a head is K x V, and V the rank of decay and gate
    expand_v: float = 1.0
    conv_size: int = 4  # kernel size of the convolutions on q, k and v; 0 = none
    allow_neg_eigval: bool = False  # beta in (0, 2), https://arxiv.org/abs/2411.12537


class KimiDeltaAttention(LinearMixer):
    module_name = "kda"
    zero_at_start = ("gate_bias",)
    rest_linears = ("wa_down", "wg_down", "wb")
    recurrence = staticmethod(kda)
    recurrence_step = staticmethod(kda_step)
    state_flops = 7  # read k^T S, write the outer product, read q^T S: 2 each; and the decay
    unit_keys = True
    conv: ShortConv
    norm: GatedRMSNorm

    def __init__(self, shared: MixerArgs, own: KDAArgs):
        super().__init__()
        self.n_heads, self.key_dim, self.value_dim = head_shape(shared, own, "model.kda")
        self.allow_neg_eigval = own.allow_neg_eigval
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        rank = self.value_dim
        self.wq = nn.Linear(shared.dim, keys, bias=False)
        self.wk = nn.Linear(shared.dim, keys, bias=False)
        self.wv = nn.Linear(shared.dim, values, bias=False)
        self.wa_down = nn.Linear(shared.dim, rank, bias=False)  # decay
        self.wa_up = nn.Linear(rank, keys, bias=False)
        self.wg_down = nn.Linear(shared.dim, rank, bias=False)  # output gate
        self.wg_up = nn.Linear(rank, values, bias=False)
        # Not wg_up's bias: 2-D parameters may be bf16, 1-D ones stay fp32.
        self.gate_bias = nn.Parameter(torch.empty(values))
        self.wb = nn.Linear(shared.dim, self.n_heads, bias=False)  # write strength
        self.wo = nn.Linear(values, shared.dim, bias=False)
        self.conv = ShortConv(2 * keys + values, own.conv_size, option="model.kda.conv_size")
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(keys))
        self.norm = GatedRMSNorm(self.value_dim, shared.output_norm_eps, activation="sigmoid")

    def expand(self, streams: Tensor, rest: Tensors) -> tuple[Tensor, Tensors]:
        a, gate, b = rest
        # A tensor-parallel rank computes a part of the low-rank activations and reads all of them.
        a, gate = self.tp.all_gather(a), self.tp.all_gather(gate)
        return streams, (self.wa_up(a), self.wg_up(gate), b)

    def inputs(self, streams: Tensors, rest: Tensors, positions: Tensor | None) -> Tensors:
        """Return (q, k, v, g, beta) by head; g (..., H, K) and beta are fp32."""
        q, k, v = streams
        a, _, b = rest
        g = log_decay(
            self.split_heads(a, self.key_dim),
            self.tp.own(self.A_log)[:, None],
            self.split_heads(self.tp.own(self.dt_bias), self.key_dim),
        )
        return q, k, v, g, write_strength(b, self.allow_neg_eigval)

    def output(self, o: Tensor, streams: Tensors, rest: Tensors) -> Tensor:
        gate = rest[1].float() + self.tp.own(self.gate_bias).float()
        return self.norm(o, self.split_heads(gate, self.value_dim)).flatten(-2)

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        # The order of the draws decides the weights that a seed gives.
        linears = (self.wq, self.wk, self.wv, self.wb)
        for linear in (*linears, self.wa_down, self.wa_up, self.wg_down, self.wg_up):
            init_linear(linear, init_std)
        init_linear(self.wo, init_std, factor)
        nn.init.zeros_(self.gate_bias)
        self.conv.reset_parameters()
        init_decay(self.A_log, self.dt_bias, least_A=1.0)
        self.norm.reset_parameters()

    def tp_plan(self) -> TensorParallelPlan:
        plan = super().tp_plan()
        plan.divides["the rank of the decay (model.kda.head_dim * expand_v)"] = self.value_dim
        return plan
