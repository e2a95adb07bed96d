"""Retention (RetNet, https://arxiv.org/abs/2307.08621): linear attention with a fixed decay per
head.

    S_t = gamma S_{t-1} + k_t v_t^T        o_t = S_t^T q_t K^-0.5        gamma = 1 - 2^(-5-h)

Head h forgets half in 22, 44, 88, .. tokens. q and k have rotary positions. The output is
RMS-normed per head and gated by SiLU. Shapes: B sequences, T tokens, H heads, K key dim,
V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.LT2.kernel.simple_gla import simple_gla, simple_gla_step
from apps.LT2.mixers.base import MixerArgs
from apps.LT2.mixers.linear import LinearMixer, Tensors, head_shape
from apps.LT2.mixers.parts import GatedRMSNorm
from lingua.transformer import check_rotary_dim, rotary_angles, rotate_pairs


@dataclass
class RetNetArgs:
    n_heads: int | None = None  # heads, each with its own decay; null = model.n_heads
    head_dim: int | None = None  # key dim of a head; null = dim / n_heads
    expand_v: float = 2.0  # value dim / key dim; the state of a head is K x V


class RetNet(LinearMixer):
    module_name = "retnet"
    reads = LinearMixer.reads | {"rope_theta"}
    rest_linears = ("wg",)
    recurrence = staticmethod(simple_gla)
    recurrence_step = staticmethod(simple_gla_step)
    state_flops = 5  # write the outer product, read q^T S: 2 each; and the decay
    uses_positions = True
    conv = None

    def __init__(self, shared: MixerArgs, own: RetNetArgs):
        super().__init__()
        self.n_heads, self.key_dim, self.value_dim = head_shape(shared, own, "model.retnet")
        check_rotary_dim(self.key_dim, option="model.retnet.head_dim")
        self.rope_theta = shared.rope_theta
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        self.wq = nn.Linear(shared.dim, keys, bias=False)
        self.wk = nn.Linear(shared.dim, keys, bias=False)
        self.wv = nn.Linear(shared.dim, values, bias=False)
        self.wg = nn.Linear(shared.dim, values, bias=False)  # output gate
        self.wo = nn.Linear(values, shared.dim, bias=False)
        self.norm = GatedRMSNorm(self.value_dim, shared.output_norm_eps)

    def inputs(self, streams: Tensor, rest: Tensors, positions: Tensor | None) -> Tensors:
        """Return rotated q and k, v, and g (H,) fp32, which is the same for all tokens."""
        assert positions is not None, "retention needs positions"
        q, k, v = self.split_qkv(streams)
        cos, sin = rotary_angles(positions, self.key_dim, self.rope_theta)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
        # A tensor-parallel rank needs the decays of its heads only.
        return q, k, v, self.tp.own(log_decays(self.n_heads * self.tp.size, v.device))


def log_decays(n_heads: int, device: torch.device) -> Tensor:
    """Return log(1 - 2^(-5-h)) of heads h = 0, 1, .., (H,) fp32."""
    heads = torch.arange(n_heads, dtype=torch.float32, device=device)
    return torch.log1p(-torch.exp2(-5 - heads))
