"""Gated linear attention (https://arxiv.org/abs/2312.06635): a learned decay per key channel.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t K^-0.5

g = log sigmoid(x W_down W_up + b) / 16 is of low rank. At the start a channel forgets half in
about 16 tokens. The output is RMS-normed per head and gated by SiLU. Shapes: B sequences,
T tokens, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.LT2.kernel.gla import gla, gla_step
from apps.LT2.mixers.base import MixerArgs, TensorParallelPlan
from apps.LT2.mixers.linear import LinearMixer, Tensors, head_shape
from apps.LT2.mixers.parts import GatedRMSNorm
from lingua.transformer import check_sizes

TEMPERATURE = 16.0  # the paper's tau: divides the log decay, so a half open gate forgets slowly


@dataclass
class GLAArgs:
    n_heads: int | None = None  # heads; null = model.n_heads
    head_dim: int | None = None  # key dim of a head; null = 0.5 * dim / n_heads
    expand_v: float = 2.0  # value dim / key dim; the state of a head is K x V
    gate_rank: int = 16  # rank of the decay's projection


class GatedLinearAttention(LinearMixer):
    module_name = "gla"
    zero_at_start = ("decay_bias",)
    rest_linears = ("wg", "wa_down")
    recurrence = staticmethod(gla)
    recurrence_step = staticmethod(gla_step)
    state_flops = 5  # write the outer product, read q^T S: 2 each; and the decay
    conv = None

    def __init__(self, shared: MixerArgs, own: GLAArgs):
        super().__init__()
        shape = head_shape(shared, own, "model.gla", key_share=0.5)
        self.n_heads, self.key_dim, self.value_dim = shape
        check_sizes("model.gla", own, "gate_rank")
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        self.wq = nn.Linear(shared.dim, keys, bias=False)
        self.wk = nn.Linear(shared.dim, keys, bias=False)
        self.wv = nn.Linear(shared.dim, values, bias=False)
        self.wg = nn.Linear(shared.dim, values, bias=False)  # output gate
        self.wa_down = nn.Linear(shared.dim, own.gate_rank, bias=False)  # decay
        self.wa_up = nn.Linear(own.gate_rank, keys, bias=False)
        # Not wa_up's bias: 2-D parameters may be bf16, 1-D ones stay fp32.
        self.decay_bias = nn.Parameter(torch.empty(keys))
        self.wo = nn.Linear(values, shared.dim, bias=False)
        self.norm = GatedRMSNorm(self.value_dim, shared.output_norm_eps)

    def expand(self, streams: Tensor, rest: Tensors) -> tuple[Tensor, Tensors]:
        gate, a = rest
        # A tensor-parallel rank computes a part of `a` and reads all of it.
        return streams, (gate, self.wa_up(self.tp.all_gather(a)))

    def inputs(self, streams: Tensor, rest: Tensors, positions: Tensor | None) -> Tensors:
        """Return (q, k, v, g) by head; g (..., H, K) is fp32."""
        g = F.logsigmoid(rest[1].float() + self.tp.own(self.decay_bias).float()) / TEMPERATURE
        return *self.split_qkv(streams), self.split_heads(g, self.key_dim)

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        super().reset_parameters(init_std, factor)
        nn.init.zeros_(self.decay_bias)

    def tp_plan(self) -> TensorParallelPlan:
        plan = super().tp_plan()
        plan.divides["the rank of the decay (model.gla.gate_rank)"] = self.wa_down.out_features
        return plan
