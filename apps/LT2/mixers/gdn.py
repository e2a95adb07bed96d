"""Gated DeltaNet (https://arxiv.org/abs/2412.06464): the delta rule with a learned decay per head.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t K^-0.5

q, k and v pass a short convolution and SiLU; q and k are unit vectors. The output is RMS-normed
per head and gated by SiLU. Shapes: B sequences, T tokens, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.LT2.kernel.gated_delta_rule import gated_delta_rule, gated_delta_step
from apps.LT2.kernel.gated_delta_rule.decode import gated_delta_layer_step, layer_step_supports
from apps.LT2.kernel.skipped_loops import DeltaUpdate
from apps.LT2.mixers.base import MixerArgs
from apps.LT2.mixers.linear import LinearCache, LinearMixer, Tensors, head_shape
from apps.LT2.mixers.parts import (
    GatedRMSNorm,
    ShortConv,
    init_decay,
    log_decay,
    write_strength,
)


@dataclass
class GatedDeltaNetArgs:
    n_heads: int | None = None  # heads; null = model.n_heads
    head_dim: int | None = None  # key dim of a head; null = 0.75 * dim / n_heads
    expand_v: float = 2.0  # value dim / key dim; the state of a head is K x V
    conv_size: int = 4  # kernel size of the convolutions on q, k and v; 0 = none
    allow_neg_eigval: bool = False  # beta in (0, 2), https://arxiv.org/abs/2411.12537


class GatedDeltaNet(LinearMixer):
    module_name = "gdn"
    rest_linears = ("wg", "wa", "wb")
    recurrence = staticmethod(gated_delta_rule)
    recurrence_step = staticmethod(gated_delta_step)
    state_flops = 7  # read k^T S, write the outer product, read q^T S: 2 each; and the decay
    unit_keys = True
    conv: ShortConv

    def __init__(self, shared: MixerArgs, own: GatedDeltaNetArgs):
        super().__init__()
        shape = head_shape(shared, own, "model.gdn", key_share=0.75)
        self.n_heads, self.key_dim, self.value_dim = shape
        self.allow_neg_eigval = own.allow_neg_eigval
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        self.wq = nn.Linear(shared.dim, keys, bias=False)
        self.wk = nn.Linear(shared.dim, keys, bias=False)
        self.wv = nn.Linear(shared.dim, values, bias=False)
        self.wg = nn.Linear(shared.dim, values, bias=False)  # output gate
        self.wa = nn.Linear(shared.dim, self.n_heads, bias=False)  # decay
        self.wb = nn.Linear(shared.dim, self.n_heads, bias=False)  # write strength
        self.wo = nn.Linear(values, shared.dim, bias=False)
        self.conv = ShortConv(2 * keys + values, own.conv_size, option="model.gdn.conv_size")
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedRMSNorm(self.value_dim, shared.output_norm_eps)

    def inputs(self, streams: Tensors, rest: Tensors, positions: Tensor | None) -> Tensors:
        """Return (q, k, v, g, beta) by head; g and beta are fp32."""
        q, k, v = streams
        _, a, b = rest
        beta = write_strength(b, self.allow_neg_eigval)
        g = log_decay(a, self.tp.own(self.A_log), self.tp.own(self.dt_bias))
        return q, k, v, g, beta

    def step_heads(self, streams: Tensor, rest: Tensors, cache: LinearCache) -> Tensor:
        if not layer_step_supports(streams, cache.state_BHKV):
            return super().step_heads(streams, rest, cache)
        weights = (self.A_log, self.dt_bias, self.norm.weight, self.norm.eps)
        return gated_delta_layer_step(
            streams, *rest, *weights, self.allow_neg_eigval, cache.state_BHKV
        )

    def skipped_update(
        self, streams: Tensor, rest: Tensors, cache: LinearCache
    ) -> DeltaUpdate | None:
        if self.conv.weight is None or self.conv.own is not None:
            return None
        assert cache.conv_state_BTC is not None
        _, a, b = rest
        weights = (self.conv.weight, self.A_log, self.dt_bias)
        states = (cache.conv_state_BTC, cache.state_BHKV)
        return DeltaUpdate(streams, a, b, *weights, *states, self.allow_neg_eigval)

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        super().reset_parameters(init_std, factor)
        init_decay(self.A_log, self.dt_bias)
