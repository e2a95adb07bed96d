"""Gated linear attention (https://arxiv.org/abs/2312.06635): a learned decay a key channel.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t K^-0.5

g = log sigmoid(x W_down W_up + b) / 16, of low rank: at the start a channel forgets half in some 16
tokens. The output is RMS-normed per head and gated by SiLU. Shapes: B sequences, T tokens, D model
width, H heads, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.LT2.kernel.gla import gla, gla_step
from apps.LT2.mixers.base import MixerArgs
from apps.LT2.mixers.linear import LinearMixer, Rest, head_shape, split_qkv
from apps.LT2.mixers.parts import GatedRMSNorm
from lingua.transformer import check_sizes, init_linear

TEMPERATURE = 16.0  # the paper's tau, divides the log decay: a half open gate forgets slowly


@dataclass
class GLAArgs:
    n_heads: int | None = None  # heads; null = model.n_heads
    head_dim: int | None = None  # key width of a head; null = 0.5 * dim / n_heads
    expand_v: float = 2.0  # value width / key width; the state of a head is K x V
    gate_rank: int = 16  # rank of the decay's projection


class GatedLinearAttention(LinearMixer):
    module_name = "gla"
    zero_at_start = ("decay_bias",)
    by_outputs = ("wq", "wk", "wv", "wg", "wa_down", "wa_up")
    conv = None

    def __init__(self, shared: MixerArgs, own: GLAArgs):
        super().__init__(shared, own)
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
        # Apart from wa_up, since matrices may be bf16 and vectors stay fp32.
        self.decay_bias = nn.Parameter(torch.empty(keys))
        self.wo = nn.Linear(values, shared.dim, bias=False)
        self.norm = GatedRMSNorm(self.value_dim, shared.norm_eps)

    def split_counts(self) -> dict[str, int]:
        rank = "the rank of its decay (model.gla.gate_rank)"
        return {**super().split_counts(), rank: self.wa_down.out_features}

    def projections(self) -> tuple[tuple[nn.Linear, ...], tuple[nn.Linear, ...]]:
        return (self.wq, self.wk, self.wv), (self.wg, self.wa_down)

    def project(self, x: Tensor) -> tuple[Tensor, Rest]:
        streams, (gate, a) = super().project(x)
        # Under tensor parallelism a rank has a part of a, and reads all of it.
        return streams, (gate, self.wa_up(self.tp.all_gather(a)))

    def inputs(
        self, streams: Tensor, rest: Rest, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, v, g) by head; g is fp32."""
        q, k, v = split_qkv(streams, self.n_heads, self.key_dim, self.value_dim)
        g = F.logsigmoid(rest[1].float() + self.tp.own(self.decay_bias).float()) / TEMPERATURE
        return q, k, v, self.split_heads(g, self.key_dim)

    def recurrence(
        self, *inputs: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return gla(*inputs, state=state, cu_seqlens=cu_seqlens)

    def recurrence_step(self, *inputs: Tensor, state_BHKV: Tensor) -> Tensor:
        return gla_step(*inputs, state_BHKV=state_BHKV)

    def output(self, o: Tensor, rest: Rest) -> Tensor:
        return self.wo(self.norm(o, self.split_heads(rest[0], self.value_dim)).flatten(-2))

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        for linear in (self.wq, self.wk, self.wv, self.wg, self.wa_down, self.wa_up):
            init_linear(linear, init_std)
        init_linear(self.wo, init_std, factor)
        nn.init.zeros_(self.decay_bias)
        self.norm.reset_parameters()

    def recurrence_flops(self) -> int:
        # Write the outer product, read q^T S: 2 K V each; and K V for the decay.
        return 5 * self.n_heads * self.key_dim * self.value_dim
