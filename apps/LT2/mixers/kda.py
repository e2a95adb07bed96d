"""Kimi delta attention (KDA, https://arxiv.org/abs/2510.26692): the delta rule with a learned decay
of every key channel.

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

q, k and v pass a short convolution and SiLU, q and k are unit vectors; the output is RMS-normed
per head and gated by a sigmoid. Decay and output gate are projections of low rank, the width of a
value head. Shapes: B sequences, T tokens, D model width, H heads, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.LT2.kernel.kda import kda, kda_step
from apps.LT2.mixers.base import MixerArgs
from apps.LT2.mixers.linear import LinearMixer, Rest, head_shape, split_qkv
from apps.LT2.mixers.parts import (
    GatedRMSNorm,
    ShortConv,
    init_decay,
    l2_normalize,
    log_decay,
    write_strength,
)
from lingua.transformer import init_linear


@dataclass
class KDAArgs:
    n_heads: int | None = None  # heads; null = model.n_heads
    head_dim: int | None = None  # key width of a head; null = dim / n_heads
    # value width / key width; the state of a head is K x V, and V the rank of decay and gate
    expand_v: float = 1.0
    conv_size: int = 4  # taps of the short causal convolutions on q, k and v; 0 = none
    allow_neg_eigval: bool = False  # beta in (0, 2), https://arxiv.org/abs/2411.12537


class KimiDeltaAttention(LinearMixer):
    module_name = "kda"
    zero_at_start = ("gate_bias",)
    by_outputs = ("wq", "wk", "wv", "wa_down", "wa_up", "wg_down", "wg_up", "wb")
    conv: ShortConv

    def __init__(self, shared: MixerArgs, own: KDAArgs):
        super().__init__(shared, own)
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
        # Apart from wg_up, since matrices may be bf16 and vectors stay fp32.
        self.gate_bias = nn.Parameter(torch.empty(values))
        self.wb = nn.Linear(shared.dim, self.n_heads, bias=False)  # write strength
        self.wo = nn.Linear(values, shared.dim, bias=False)
        self.conv = ShortConv(2 * keys + values, own.conv_size, option="model.kda.conv_size")
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(keys))
        self.norm = GatedRMSNorm(self.value_dim, shared.norm_eps, activation="sigmoid")

    def split_counts(self) -> dict[str, int]:
        rank = "the rank of its decay, a head's value width (model.kda.head_dim * expand_v)"
        return {**super().split_counts(), rank: self.value_dim}

    def projections(self) -> tuple[tuple[nn.Linear, ...], tuple[nn.Linear, ...]]:
        return (self.wq, self.wk, self.wv), (self.wa_down, self.wg_down, self.wb)

    def project(self, x: Tensor) -> tuple[Tensor, Rest]:
        streams, (a, gate, b) = super().project(x)
        # Under tensor parallelism a rank has a part of the two narrow vectors, and reads all.
        a, gate = self.tp.all_gather(a), self.tp.all_gather(gate)
        return streams, (self.wa_up(a), self.wg_up(gate), b)

    def inputs(
        self, streams: Tensor, rest: Rest, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(q, k, v, g, beta) by head; q and k are unit vectors, g and beta fp32."""
        q, k, v = split_qkv(streams, self.n_heads, self.key_dim, self.value_dim)
        a, _, b = rest
        g = log_decay(
            self.split_heads(a, self.key_dim),
            self.tp.own(self.A_log)[:, None],
            self.split_heads(self.tp.own(self.dt_bias), self.key_dim),
        )
        return l2_normalize(q), l2_normalize(k), v, g, write_strength(b, self.allow_neg_eigval)

    def recurrence(
        self, *inputs: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return kda(*inputs, state=state, cu_seqlens=cu_seqlens)

    def recurrence_step(self, *inputs: Tensor, state_BHKV: Tensor) -> Tensor:
        return kda_step(*inputs, state_BHKV=state_BHKV)

    def output(self, o: Tensor, rest: Rest) -> Tensor:
        gate = rest[1].float() + self.tp.own(self.gate_bias).float()
        return self.wo(self.norm(o, self.split_heads(gate, self.value_dim)).flatten(-2))

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        linears = (self.wq, self.wk, self.wv, self.wb)
        for linear in (*linears, self.wa_down, self.wa_up, self.wg_down, self.wg_up):
            init_linear(linear, init_std)
        init_linear(self.wo, init_std, factor)
        nn.init.zeros_(self.gate_bias)
        self.conv.reset_parameters()
        init_decay(self.A_log, self.dt_bias, least_A=1.0)
        self.norm.reset_parameters()

    def recurrence_flops(self) -> int:
        # Read k^T S, write the outer product, read q^T S: 2 K V each; and K V for the decay.
        return 7 * self.n_heads * self.key_dim * self.value_dim
