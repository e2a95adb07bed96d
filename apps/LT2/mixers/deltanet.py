"""DeltaNet (https://arxiv.org/abs/2406.06484): the delta rule without decay.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t K^-0.5

q, k and v pass a short convolution and SiLU; q and k are unit vectors. The output is RMS-normed
per head, without a gate. Shapes: B sequences, T tokens, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from apps.LT2.kernel.delta_rule import delta_rule, delta_rule_step
from apps.LT2.mixers.base import MixerArgs
from apps.LT2.mixers.linear import LinearMixer, Tensors, head_shape
from apps.LT2.mixers.parts import ShortConv, write_strength
from lingua.transformer import RMSNorm


@dataclass
class DeltaNetArgs:
    n_heads: int | None = None  # heads; null = model.n_heads
    head_dim: int | None = None  # key dim of a head; null = dim / n_heads
    expand_v: float = 1.0  # value dim / key dim; the state of a head is K x V
    conv_size: int = 4  # kernel size of the convolutions on q, k and v; 0 = none
    allow_neg_eigval: bool = False  # beta in (0, 2), https://arxiv.org/abs/2411.12537


class DeltaNet(LinearMixer):
    module_name = "deltanet"
    rest_linears = ("wb",)
    recurrence = staticmethod(delta_rule)
    recurrence_step = staticmethod(delta_rule_step)
    state_flops = 6  # read k^T S, write the outer product, read q^T S: 2 each
    unit_keys = True
    conv: ShortConv

    def __init__(self, shared: MixerArgs, own: DeltaNetArgs):
        super().__init__()
        self.n_heads, self.key_dim, self.value_dim = head_shape(shared, own, "model.deltanet")
        self.allow_neg_eigval = own.allow_neg_eigval
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        self.wq = nn.Linear(shared.dim, keys, bias=False)
        self.wk = nn.Linear(shared.dim, keys, bias=False)
        self.wv = nn.Linear(shared.dim, values, bias=False)
        self.wb = nn.Linear(shared.dim, self.n_heads, bias=False)  # write strength
        self.wo = nn.Linear(values, shared.dim, bias=False)
        self.conv = ShortConv(2 * keys + values, own.conv_size, option="model.deltanet.conv_size")
        self.norm = RMSNorm(self.value_dim, shared.output_norm_eps)

    def inputs(self, streams: Tensors, rest: Tensors, positions: Tensor | None) -> Tensors:
        """Return (q, k, v, beta) by head; beta is fp32."""
        q, k, v = streams
        return q, k, v, write_strength(rest[0], self.allow_neg_eigval)

    def output(self, o: Tensor, streams: Tensors, rest: Tensors) -> Tensor:
        return self.norm(o).flatten(-2)
