"""Gated DeltaNet (https://arxiv.org/abs/2412.06464): the delta rule with a learned decay.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

q, k and v pass a short convolution and SiLU, q and k are unit vectors; the output is RMS-normed
per head and gated by SiLU. Shapes: B sequences, T tokens, D model width, H heads, K key width,
V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from apps.LT2.kernel.gated_delta_rule import gated_delta_rule, gated_delta_step
from apps.LT2.mixers.base import Mixer, MixerCache, cache_rows
from apps.LT2.mixers.parts import GatedRMSNorm, ShortConv, init_decay, l2_normalize, log_decay
from lingua.args import UserError
from lingua.transformer import check_sizes, init_linear

if TYPE_CHECKING:
    from apps.LT2.transformer import LoopedTransformerArgs


@dataclass
class GatedDeltaNetArgs:
    n_heads: int | None = None  # heads; null = model.n_heads
    head_dim: int | None = None  # key width of a head; null = 0.75 * dim / n_heads
    expand_v: float = 2.0  # value width / key width; the state of a head is K x V
    conv_size: int = 4  # taps of the short causal convolutions on q, k and v; 0 = none
    allow_neg_eigval: bool = False  # beta in (0, 2), https://arxiv.org/abs/2411.12537


@dataclass
class GatedDeltaNetCache(MixerCache):
    state_BHKV: Tensor  # fp32: it sums over the whole past
    tail_q_BTC: Tensor  # last conv_size - 1 inputs of each convolution
    tail_k_BTC: Tensor
    tail_v_BTC: Tensor


class GatedDeltaNet(Mixer):
    module_name = "gdn"

    def __init__(self, args: LoopedTransformerArgs):
        super().__init__()
        self.n_heads, self.key_dim, self.value_dim = head_shape(args)
        self.dim, self.allow_neg_eigval = args.dim, args.gdn.allow_neg_eigval
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        self.wq = nn.Linear(args.dim, keys, bias=False)
        self.wk = nn.Linear(args.dim, keys, bias=False)
        self.wv = nn.Linear(args.dim, values, bias=False)
        self.wg = nn.Linear(args.dim, values, bias=False)  # output gate
        self.wa = nn.Linear(args.dim, self.n_heads, bias=False)  # decay
        self.wb = nn.Linear(args.dim, self.n_heads, bias=False)  # write strength
        self.wo = nn.Linear(values, args.dim, bias=False)
        option = "model.gdn.conv_size"
        self.conv_q = ShortConv(keys, args.gdn.conv_size, option=option)
        self.conv_k = ShortConv(keys, args.gdn.conv_size, option=option)
        self.conv_v = ShortConv(values, args.gdn.conv_size, option=option)
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedRMSNorm(self.value_dim, args.norm_eps)

    def forward(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        assert window is None, "gdn has no window"
        q = self.conv_q(self.wq(x_BTD), cu_seqlens=cu_seqlens)
        k = self.conv_k(self.wk(x_BTD), cu_seqlens=cu_seqlens)
        v = self.conv_v(self.wv(x_BTD), cu_seqlens=cu_seqlens)
        o, _ = gated_delta_rule(
            *self._heads(q, k, v), *self._decay_and_strength(x_BTD), cu_seqlens=cu_seqlens
        )
        return self._output(o, x_BTD)

    def init_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        window: int | None = None,
    ) -> GatedDeltaNetCache:
        n_tail = max(self.conv_q.size - 1, 0)
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        tails = (
            torch.zeros(batch_size, n_tail, channels, device=device, dtype=dtype)
            for channels in (keys, keys, values)
        )
        state_shape = (batch_size, self.n_heads, self.key_dim, self.value_dim)
        return GatedDeltaNetCache(
            torch.zeros(state_shape, device=device, dtype=torch.float32), *tails
        )

    def prefill(
        self,
        x_BTD: Tensor,
        cache: GatedDeltaNetCache,
        *,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        rows, _ = cache_rows(x_BTD, cu_seqlens, rows)

        def convolve(conv: ShortConv, x: Tensor, tails: Tensor) -> Tensor:
            tail = tails[rows]
            y = conv(x, tail=tail, cu_seqlens=cu_seqlens)
            if conv.size:
                tails[rows] = conv.next_tail(x, tail=tail, cu_seqlens=cu_seqlens).to(tails.dtype)
            return y

        q = convolve(self.conv_q, self.wq(x_BTD), cache.tail_q_BTC)
        k = convolve(self.conv_k, self.wk(x_BTD), cache.tail_k_BTC)
        v = convolve(self.conv_v, self.wv(x_BTD), cache.tail_v_BTC)
        o, state = gated_delta_rule(
            *self._heads(q, k, v),
            *self._decay_and_strength(x_BTD),
            state=cache.state_BHKV[rows],
            cu_seqlens=cu_seqlens,
        )
        cache.state_BHKV[rows] = state
        return self._output(o, x_BTD)

    def step(self, x_B1D: Tensor, cache: GatedDeltaNetCache) -> Tensor:
        x = x_B1D[:, 0]
        q = self.conv_q.step(self.wq(x), cache.tail_q_BTC)
        k = self.conv_k.step(self.wk(x), cache.tail_k_BTC)
        v = self.conv_v.step(self.wv(x), cache.tail_v_BTC)
        o = gated_delta_step(*self._heads(q, k, v), *self._decay_and_strength(x), cache.state_BHKV)
        return self._output(o[:, None], x_B1D)

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        for linear in (self.wq, self.wk, self.wv, self.wg, self.wa, self.wb):
            init_linear(linear, init_std)
        init_linear(self.wo, init_std, factor)
        for conv in (self.conv_q, self.conv_k, self.conv_v):
            conv.reset_parameters()
        init_decay(self.A_log, self.dt_bias)
        self.norm.reset_parameters()

    def flops_per_token(self, seqlen: int, window: int | None = None) -> int:
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        projections = 2 * self.dim * (2 * keys + 3 * values + 2 * self.n_heads)
        convolutions = 2 * self.conv_q.size * (2 * keys + values)
        # Read k^T S, write the outer product, read q^T S: 2 K V each; and K V for the decay.
        recurrence = 7 * self.n_heads * self.key_dim * self.value_dim
        return projections + convolutions + recurrence

    def state_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        keys, values = self.n_heads * self.key_dim, self.n_heads * self.value_dim
        tail = max(self.conv_q.size - 1, 0) * (2 * keys + values) * dtype.itemsize
        return 4 * self.n_heads * self.key_dim * self.value_dim + tail

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (..., H * width) into heads; q and k become unit vectors."""
        q = l2_normalize(q.unflatten(-1, (self.n_heads, self.key_dim)))
        k = l2_normalize(k.unflatten(-1, (self.n_heads, self.key_dim)))
        return q, k, v.unflatten(-1, (self.n_heads, self.value_dim))

    def _decay_and_strength(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(g, beta), fp32, (..., H)."""
        beta = torch.sigmoid(self.wb(x).float())
        if self.allow_neg_eigval:
            beta = 2 * beta
        return log_decay(self.wa(x), self.A_log, self.dt_bias), beta

    def _output(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        gate = self.wg(x_BTD).unflatten(-1, (self.n_heads, self.value_dim))
        return self.wo(self.norm(o_BTHV, gate).flatten(2))


def head_shape(args: LoopedTransformerArgs) -> tuple[int, int, int]:
    """(heads, key width, value width) of `model.gdn`; UserError where they are no whole numbers."""
    gdn = args.gdn
    check_sizes("model", args, "n_heads")
    check_sizes("model.gdn", gdn, "n_heads", "head_dim")
    n_heads = gdn.n_heads or args.n_heads
    if n_heads is None:
        raise UserError("model.gdn.n_heads and model.n_heads are both null: set one, e.g. 8")
    if gdn.head_dim is None and 3 * args.dim % (4 * n_heads):
        raise UserError(
            f"model.gdn.head_dim: 0.75 * dim / n_heads = 0.75 * {args.dim} / {n_heads} is no whole "
            "number; set model.gdn.head_dim"
        )
    key_dim = gdn.head_dim or 3 * args.dim // (4 * n_heads)
    value_dim = key_dim * gdn.expand_v
    if value_dim < 1 or value_dim != int(value_dim):
        raise UserError(
            f"model.gdn.expand_v={gdn.expand_v} times the key width {key_dim} is no whole number; "
            "use 1, 1.5 or 2"
        )
    return n_heads, key_dim, int(value_dim)
