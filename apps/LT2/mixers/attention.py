"""Softmax attention, full or over a sliding window, with grouped queries and rotary positions.

The output gate (`gated_attn`) is the sigmoid gate on the attention output of Qiu et al., "Gated
Attention for Large Language Models" (https://arxiv.org/abs/2505.06708).

Shapes: B sequences, T tokens, D model width, H query heads, G key/value heads, K head width,
S slots of a cache. `full` and `window` are one module: a layer may change width from loop to loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.LT2.kernel.attention import attention, check_attention_impl, decode_attention
from apps.LT2.kernel.attention.first_token import first_token_mass
from apps.LT2.kernel.documents import local_positions
from apps.LT2.mixers.base import (
    Extension,
    Mixer,
    MixerArgs,
    MixerCache,
    cache_positions,
    cache_rows,
    known_past,
)
from lingua.parallel.tensor_parallel import TensorParallel
from lingua.probe import is_probing, log_stats
from lingua.transformer import (
    check_rotary_width,
    fused_linear,
    init_linear,
    resolve_heads,
    rotary_angles,
    rotate_pairs,
)


@dataclass
class AttentionCache(MixerCache):
    """Keys and values by position; a window's cache is a ring of its w slots."""

    k_BSGK: Tensor
    v_BSGK: Tensor
    length_B: Tensor  # int64, tokens seen; position p lies in slot p % S


class Attention(Mixer):
    module_name = "attention"
    reads = frozenset(
        {"n_heads", "head_dim", "n_kv_heads", "rope_theta", "gated_attn", "attn_impl"}
    )
    uses_fla = False
    zero_at_start = ("wg.weight",)
    by_outputs = ("wq", "wk", "wv", "wg")
    by_inputs = ("wo",)

    def __init__(self, shared: MixerArgs, own: None = None):
        super().__init__(shared, own)
        self.n_heads, self.n_kv_heads, self.head_dim = resolve_heads(shared)
        check_rotary_width(self.head_dim)
        check_attention_impl(shared.attn_impl, windowed=False)
        self.dim, self.rope_theta, self.attn_impl = shared.dim, shared.rope_theta, shared.attn_impl
        self.wq = nn.Linear(shared.dim, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(shared.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(shared.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.n_heads * self.head_dim, shared.dim, bias=False)
        self.wg = (
            nn.Linear(shared.dim, self.n_heads * self.head_dim, bias=False)
            if shared.gated_attn
            else None
        )

    def split_counts(self) -> dict[str, int] | None:
        return {
            "the query heads (model.n_heads)": self.n_heads,
            "the key/value heads (model.n_kv_heads)": self.n_kv_heads,
        }

    def split(self, tp: TensorParallel) -> None:
        super().split(tp)
        self.n_kv_heads //= tp.size

    def forward(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        positions = local_positions(x_BTD.shape[1], cu_seqlens, x_BTD.device)
        q, k, v = self._qkv(x_BTD, positions)
        if is_probing():
            mass = first_token_mass(q, k, window=window, cu_seqlens=cu_seqlens)
            log_stats(mass, "first_token_mass")
        o = attention(q, k, v, window=window, cu_seqlens=cu_seqlens, impl=self.attn_impl)
        return self._output(o, x_BTD)

    def init_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        window: int | None = None,
    ) -> AttentionCache:
        shape = (batch_size, self._slots(max_seqlen, window), self.n_kv_heads, self.head_dim)
        return AttentionCache(
            k_BSGK=torch.zeros(shape, device=device, dtype=dtype),
            v_BSGK=torch.zeros(shape, device=device, dtype=dtype),
            length_B=torch.zeros(batch_size, device=device, dtype=torch.int64),
        )

    def prefill(
        self,
        x_BTD: Tensor,
        cache: AttentionCache,
        *,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
        window: int | None = None,
        past: Sequence[Extension] | None = None,
    ) -> Tensor:
        rows, lengths = cache_rows(x_BTD, cu_seqlens, rows)
        starts = cache.length_B[rows]
        past = known_past(past, rows, starts, lengths)
        q, k, v = self._qkv(x_BTD, cache_positions(x_BTD, cu_seqlens, starts))
        if past:
            o = self._attend_past(q, k, v, cache, past, window)
        else:
            o = attention(q, k, v, window=window, cu_seqlens=cu_seqlens, impl=self.attn_impl)
        append([(k, cache.k_BSGK), (v, cache.v_BSGK)], cache.length_B, rows, lengths)
        return self._output(o, x_BTD)

    def step(self, x_B1D: Tensor, cache: AttentionCache) -> Tensor:
        n_slots = cache.k_BSGK.shape[1]
        q, k, v = self._qkv(x_B1D, cache.length_B[:, None])
        batch = torch.arange(x_B1D.shape[0], device=x_B1D.device)
        slot = cache.length_B % n_slots
        cache.k_BSGK[batch, slot] = k[:, 0].to(cache.k_BSGK.dtype)
        cache.v_BSGK[batch, slot] = v[:, 0].to(cache.v_BSGK.dtype)
        cache.length_B += 1
        n_valid = cache.length_B.clamp(max=n_slots)
        k_past, v_past = cache.k_BSGK.type_as(q), cache.v_BSGK.type_as(q)
        return self._output(decode_attention(q[:, 0], k_past, v_past, n_valid)[:, None], x_B1D)

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        for linear in (self.wq, self.wk, self.wv):
            init_linear(linear, init_std)
        init_linear(self.wo, init_std, factor)
        if self.wg is not None:
            nn.init.zeros_(self.wg.weight)  # sigmoid(0): every head starts half open

    def flops_per_token(self, seqlen: int, window: int | None = None) -> int:
        width = self.n_heads * self.head_dim
        n_wide = 2 if self.wg is None else 3  # wq, wo, wg; wk and wv have their own heads
        projections = 2 * self.dim * (n_wide * width + 2 * self.n_kv_heads * self.head_dim)
        return projections + 4 * width * visible_pairs(seqlen, window) // seqlen

    def state_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        return 2 * self._slots(seqlen, window) * self.n_kv_heads * self.head_dim * dtype.itemsize

    @staticmethod
    def _slots(max_seqlen: int, window: int | None) -> int:
        return max_seqlen if window is None else min(window, max_seqlen)

    def _qkv(self, x_BTD: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, heads, K), rotated to `positions`, (T,) or (B, T)."""
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)) for y in fused_linear(x_BTD, self.fused_linears())
        )
        return *rotate_heads(q, k, positions, self.rope_theta), v

    def fused_linears(self) -> tuple[nn.Linear, ...]:
        return (self.wq, self.wk, self.wv)

    def _output(self, o_BTHK: Tensor, x_BTD: Tensor) -> Tensor:
        o = o_BTHK.flatten(2)
        if self.wg is not None:
            o = o * torch.sigmoid(self.wg(x_BTD))
        return self.wo(o)

    def _attend_past(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: AttentionCache,
        past: Sequence[Extension],
        window: int | None,
    ) -> Tensor:
        """Attention of new tokens over what is cached and over themselves, sequence by sequence."""
        n_slots = cache.k_BSGK.shape[1]
        sizes = [extension.new for extension in past]
        new = (x.flatten(0, 1).split(sizes) for x in (q, k, v))
        pieces = []
        for (row, held, _), q_new, k_new, v_new in zip(past, *new, strict=True):
            slots = torch.arange(max(0, held - n_slots), held, device=q.device) % n_slots
            k_all = torch.cat((cache.k_BSGK[row, slots].type_as(k_new), k_new))
            v_all = torch.cat((cache.v_BSGK[row, slots].type_as(v_new), v_new))
            # Queries of the past are not needed; zeros in their place keep the causal shape.
            q_all = torch.cat((q_new.new_zeros(len(slots), *q_new.shape[1:]), q_new))
            o = attention(q_all[None], k_all[None], v_all[None], window=window, impl=self.attn_impl)
            pieces.append(o[0, len(slots) :])
        return torch.cat(pieces).view_as(q)


def rotate_heads(
    q_BTHK: Tensor, k_BTGK: Tensor, positions: Tensor, theta: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned to `positions`, (T,) or (B, T), all heads alike."""
    cos, sin = rotary_angles(positions, q_BTHK.shape[-1], theta)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return rotate_pairs(q_BTHK, cos, sin), rotate_pairs(k_BTGK, cos, sin)


def visible_pairs(seqlen: int, window: int | None) -> int:
    """Keys that the queries of a sequence see, over all of them."""
    w = min(window or seqlen, seqlen)
    return w * (w + 1) // 2 + (seqlen - w) * w


def append(
    new_and_slots: list[tuple[Tensor, Tensor]], length_B: Tensor, rows: Tensor, lengths: Tensor
) -> None:
    """Write what a prefill adds, (n_sequences, T, ...) or packed (1, T, ...), to its slots
    (B, S, ...), all in place; a ring keeps the last S. `rows` and `lengths` as of `cache_rows`.

    What a ring does not keep is not left out, since the device alone knows how much that is: a
    token whose slot a later one takes writes what that one writes.
    """
    n_tokens = new_and_slots[0][0].flatten(0, 1).shape[0]
    n_slots = new_and_slots[0][1].shape[1]
    ends = lengths.cumsum(0)
    token = torch.arange(n_tokens, device=length_B.device)
    sequence = torch.searchsorted(ends, token, right=True)
    left = ends[sequence] - token  # tokens of its sequence from this one on
    row = rows[sequence]
    position = length_B[row] + token - (ends - lengths)[sequence]
    slot, last = position % n_slots, token + (left - 1) // n_slots * n_slots
    for new, slots in new_and_slots:
        slots[row, slot] = new.flatten(0, 1)[last].to(slots.dtype)
    length_B[rows] += lengths
