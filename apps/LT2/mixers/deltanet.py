"""DeltaNet (https://arxiv.org/abs/2406.06484): the delta rule without decay.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

q, k and v pass a short convolution and SiLU, q and k are unit vectors; the output is RMS-normed
per head, and not gated. Shapes: B sequences, T tokens, D model width, H heads, K key width,
V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from apps.LT2.kernel.delta_rule import delta_rule, delta_rule_step
from apps.LT2.mixers.base import MixerArgs
from apps.LT2.mixers.linear import LinearMixer, Rest, head_shape, split_qkv
from apps.LT2.mixers.parts import HeadRMSNorm, ShortConv, l2_normalize, write_strength
from lingua.transformer import init_linear


@dataclass
class DeltaNetArgs:
    n_heads: int | None = None  # heads; null = model.n_heads
    head_dim: int | None = None  # key width of a head; null = dim / n_heads
    expand_v: float = 1.0  # value width / key width; the state of a head is K x V
    conv_size: int = 4  # taps of the short causal convolutions on q, k and v; 0 = none
    allow_neg_eigval: bool = False  # beta in (0, 2), https://arxiv.org/abs/2411.12537


class DeltaNet(LinearMixer):
    module_name = "deltanet"
    by_outputs = ("wq", "wk", "wv", "wb")
    conv: ShortConv

    def __init__(self, shared: MixerArgs, own: DeltaNetArgs):
        super().__init__(shared, own)
        self.n_heads, self.key_dim, self.value_dim = head_shape(shared, own, "model.deltanet")
        self.allow_neg_eigval = own.allow_neg_eigval
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        self.wq = nn.Linear(shared.dim, keys, bias=False)
        self.wk = nn.Linear(shared.dim, keys, bias=False)
        self.wv = nn.Linear(shared.dim, values, bias=False)
        self.wb = nn.Linear(shared.dim, self.n_heads, bias=False)  # write strength
        self.wo = nn.Linear(values, shared.dim, bias=False)
        conv_size = own.conv_size
        self.conv = ShortConv(2 * keys + values, conv_size, option="model.deltanet.conv_size")
        self.norm = HeadRMSNorm(self.value_dim, shared.norm_eps)

    def projections(self) -> tuple[tuple[nn.Linear, ...], tuple[nn.Linear, ...]]:
        return (self.wq, self.wk, self.wv), (self.wb,)

    def inputs(
        self, streams: Tensor, rest: Rest, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, v, beta) by head; q and k are unit vectors, beta is fp32."""
        q, k, v = split_qkv(streams, self.n_heads, self.key_dim, self.value_dim)
        beta = write_strength(rest[0], self.allow_neg_eigval)
        return l2_normalize(q), l2_normalize(k), v, beta

    def recurrence(
        self, *inputs: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return delta_rule(*inputs, state=state, cu_seqlens=cu_seqlens)

    def recurrence_step(self, *inputs: Tensor, state_BHKV: Tensor) -> Tensor:
        return delta_rule_step(*inputs, state_BHKV=state_BHKV)

    def output(self, o: Tensor, rest: Rest) -> Tensor:
        return self.wo(self.norm(o).flatten(-2))

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        for linear in (self.wq, self.wk, self.wv, self.wb):
            init_linear(linear, init_std)
        init_linear(self.wo, init_std, factor)
        self.conv.reset_parameters()
        self.norm.reset_parameters()

    def recurrence_flops(self) -> int:
        # Read k^T S, write the outer product, read q^T S: 2 K V each.
        return 6 * self.n_heads * self.key_dim * self.value_dim
