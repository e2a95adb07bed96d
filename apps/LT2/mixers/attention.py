"""Softmax attention, full or over a sliding window, with grouped queries and rotary positions.

    o_t = sum_s softmax(q_t . k_s K^-0.5) v_s        over the visible tokens s

The output gate (`gated_attn`) is the sigmoid gate of Qiu et al., "Gated Attention for Large
Language Models" (https://arxiv.org/abs/2505.06708). `attn_bias` and `qk_norm` are as in Qwen2
and Qwen3; q and k are normalized before the rotation.

Shapes: B sequences, T tokens, D model dim, H query heads, G key/value heads, K head dim, S slots
of a cache. `full` and `window` are one module, so a layer may change its window from loop to loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.LT2.kernel.attention import attention, check_attention_impl, decode_attention
from apps.LT2.kernel.attention.first_token import first_token_mass
from apps.LT2.kernel.decode_linear import Norm, decode_linear
from apps.LT2.kernel.documents import local_positions
from apps.LT2.kernel.skipped_loops import SkippedLoops, SlotCopy
from apps.LT2.mixers.base import (
    Mixer,
    MixerArgs,
    MixerCache,
    Past,
    Prompts,
    TensorParallelPlan,
    by_sequence,
)
from apps.LT2.mixers.parts import decode_weight
from apps.LT2.mixers.rotary import RopeScalingArgs, rotary_angles
from lingua.errors import UserError
from lingua.probe import is_probing, log_stats
from lingua.transformer import (
    Linear,
    RMSNorm,
    check_rotary_dim,
    fused_linear,
    init_linear,
    resolve_heads,
    rotate_pairs,
)

QKV = tuple[Tensor, Tensor, Tensor]
BIASES = ("none", "qkv", "qkvo")  # which projections have a bias, model.attn_bias
BIAS_NAMES = ("wq.bias", "wk.bias", "wv.bias", "wo.bias")


@dataclass
class AttentionCache(MixerCache):
    """Keys and values by position; a window's cache is a ring buffer."""

    k_BSGK: Tensor
    v_BSGK: Tensor
    length_B: Tensor  # int64, tokens seen; position p is in slot p % S

    def can_crop(self, longest: int) -> bool:
        return longest <= self.k_BSGK.shape[1]  # a ring that is full has dropped tokens

    def crop(self, length_B: Tensor) -> None:
        self.length_B.copy_(length_B)

    def copy_last(self, source: AttentionCache, skipped: SkippedLoops) -> bool:
        skipped.copies += [
            SlotCopy(other, slots, source.length_B, self.length_B)
            for slots, other in zip(self.slots(), source.slots(), strict=True)
        ]
        return True

    def slots(self) -> tuple[Tensor, ...]:
        """Return the tensors (B, S, ...) that have a slot for each token."""
        return self.k_BSGK, self.v_BSGK


class Attention(Mixer):
    module_name = "attention"
    reads = frozenset(
        {"n_heads", "head_dim", "n_kv_heads", "rope_theta", "rope_scaling"}
        | {"gated_attn", "attn_bias", "qk_norm", "attn_impl"}
    )
    uses_fla = False
    zero_at_start = ("wg.weight", *BIAS_NAMES)

    def __init__(self, shared: MixerArgs, own: None = None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = resolve_heads(shared)
        check_rotary_dim(self.head_dim)
        check_attention_impl(shared.attn_impl, windowed=False)
        self.dim, self.attn_impl = shared.dim, shared.attn_impl
        self.rope_theta, self.rope_scaling = shared.rope_theta, shared.rope_scaling
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        qkv_bias, output_bias = resolve_biases(shared)
        self.wq = Linear(shared.dim, queries, bias=qkv_bias)
        self.wk = Linear(shared.dim, keys, bias=qkv_bias)
        self.wv = Linear(shared.dim, keys, bias=qkv_bias)
        self.wo = Linear(queries, shared.dim, bias=output_bias)
        self.wg = nn.Linear(shared.dim, queries, bias=False) if shared.gated_attn else None
        self.q_norm, self.k_norm = qk_norms(shared, self.head_dim)

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
        self, batch_size: int, max_seqlen: int, like: Tensor, window: int | None = None
    ) -> AttentionCache:
        shape = (batch_size, self._slots(max_seqlen, window), self.n_kv_heads, self.head_dim)
        length_B = like.new_zeros(batch_size, dtype=torch.int64)
        return AttentionCache(like.new_zeros(shape), like.new_zeros(shape), length_B)

    def prefill(
        self, x_BTD: Tensor, cache: AttentionCache, prompts: Prompts, window: int | None = None
    ) -> Tensor:
        rows, lengths = prompts.rows_and_lengths(x_BTD)
        held = cache.length_B[rows]
        past = prompts.known_past(rows, held, lengths)
        q, k, v = qkv = self._qkv(x_BTD, prompts.positions(x_BTD, held))
        if past:
            o = self._attend_past(qkv, cache, past, window)
        else:
            o = attention(*qkv, window=window, cu_seqlens=prompts.cu_seqlens, impl=self.attn_impl)
        append([(k, cache.k_BSGK), (v, cache.v_BSGK)], cache.length_B, rows, lengths)
        return self._output(o, x_BTD)

    def step(self, x_B1D: Tensor, cache: AttentionCache) -> Tensor:
        qkv = self._qkv(x_B1D, cache.length_B[:, None])
        return self._output(self._attend_cache(qkv, cache), x_B1D)

    def add_step(self, h_B1D: Tensor, norm: RMSNorm, cache: AttentionCache) -> Tensor:
        linears = self.decode_linears()
        weight, out = decode_weight(linears), decode_weight((self.wo,))
        if weight is None or out is None:
            return super().add_step(h_B1D, norm, cache)
        h_BD = h_B1D[:, 0]
        product = decode_linear(h_BD, weight, norm=Norm(norm.weight, norm.eps))
        q, k, v, *gate = product[:, None].split([m.out_features for m in linears], dim=-1)
        o = self._attend_cache(self._place((q, k, v), cache.length_B[:, None]), cache).flatten(1)
        if gate:
            o = o * torch.sigmoid(gate[0][:, 0])
        return decode_linear(o, out, residual_BN=h_BD)[:, None]

    def _attend_cache(self, qkv: QKV, cache: AttentionCache) -> Tensor:
        """Append one token of each row to the cache and attend to it: (B, 1, H, K)."""
        n_slots, (q, k, v) = cache.k_BSGK.shape[1], qkv
        slot_B = cache.length_B % n_slots
        append_step([(k, cache.k_BSGK), (v, cache.v_BSGK)], slot_B)
        cache.length_B += 1
        n_valid = cache.length_B.clamp(max=n_slots)
        k_past, v_past = cache.k_BSGK.type_as(q), cache.v_BSGK.type_as(q)
        return decode_attention(q[:, 0], k_past, v_past, n_valid)[:, None]

    def fused_linears(self) -> tuple[nn.Linear, ...]:
        return (self.wq, self.wk, self.wv)

    def decode_linears(self) -> tuple[nn.Linear, ...]:
        return self.fused_linears() if self.wg is None else (*self.fused_linears(), self.wg)

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        for linear in (self.wq, self.wk, self.wv):
            init_linear(linear, init_std)
        init_linear(self.wo, init_std, factor)
        if self.wg is not None:
            nn.init.zeros_(self.wg.weight)  # sigmoid(0): every head starts half open
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def flops_per_token(self, seqlen: int, window: int | None = None) -> int:
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        n_query_sized = 2 if self.wg is None else 3  # wq, wo, wg
        projections = 2 * self.dim * (n_query_sized * queries + 2 * keys)
        return projections + 4 * queries * visible_pairs(seqlen, window) // seqlen

    def state_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        return 2 * self._slots(seqlen, window) * self.n_kv_heads * self.head_dim * dtype.itemsize

    def tp_plan(self) -> TensorParallelPlan | None:
        divides = {
            "the query heads (model.n_heads)": self.n_heads,
            "the key/value heads (model.n_kv_heads)": self.n_kv_heads,
        }
        return TensorParallelPlan(divides, heads=("n_heads", "n_kv_heads"))

    @staticmethod
    def _slots(max_seqlen: int, window: int | None) -> int:
        return max_seqlen if window is None else min(window, max_seqlen)

    def _qkv(self, x_BTD: Tensor, positions: Tensor) -> QKV:
        """Return q, k, v (B, T, heads, K); q and k are rotated to `positions`, (T,) or (B, T)."""
        return self._place(fused_linear(x_BTD, self.fused_linears()), positions)

    def _place(self, projections: Sequence[Tensor], positions: Tensor) -> QKV:
        """Split projections (B, T, ...) into heads, normalize and rotate them as `_qkv` says."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projections)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return *rotate_heads(q, k, positions, self.rope_theta, self.rope_scaling), v

    def _output(self, o_BTHK: Tensor, x_BTD: Tensor) -> Tensor:
        o = o_BTHK.flatten(2)
        if self.wg is not None:
            o = o * torch.sigmoid(self.wg(x_BTD))
        return self.wo(o)

    def _attend_past(
        self, qkv: QKV, cache: AttentionCache, past: Past, window: int | None
    ) -> Tensor:
        """Attend from new tokens to cached and new ones, one sequence at a time."""
        n_slots, outputs = cache.k_BSGK.shape[1], []
        for (row, held, _), q_new, k_new, v_new in by_sequence(past, *qkv):
            slots = torch.arange(max(0, held - n_slots), held, device=q_new.device) % n_slots
            k_all = torch.cat((cache.k_BSGK[row, slots].type_as(k_new), k_new))
            v_all = torch.cat((cache.v_BSGK[row, slots].type_as(v_new), v_new))
            # Zeros stand for the queries of the past, so the attention stays causal.
            q_all = torch.cat((q_new.new_zeros(len(slots), *q_new.shape[1:]), q_new))
            o = attention(q_all[None], k_all[None], v_all[None], window=window, impl=self.attn_impl)
            outputs.append(o[0, len(slots) :])
        return torch.cat(outputs).view_as(qkv[0])


def resolve_biases(shared: MixerArgs) -> tuple[bool, bool]:
    """Return whether wq, wk and wv have a bias, and whether wo has; UserError for other names."""
    if shared.attn_bias not in BIASES:
        raise UserError(f"model.attn_bias={shared.attn_bias} must be one of {', '.join(BIASES)}")
    return shared.attn_bias != "none", shared.attn_bias == "qkvo"


def qk_norms(shared: MixerArgs, head_dim: int) -> tuple[RMSNorm, RMSNorm] | tuple[None, None]:
    """Return the norms of queries and keys, which all heads share."""
    if not shared.qk_norm:
        return None, None
    return RMSNorm(head_dim, shared.norm_eps), RMSNorm(head_dim, shared.norm_eps)


def rotate_heads(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    positions: Tensor,
    theta: float,
    scaling: RopeScalingArgs | None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys to `positions`, (T,) or (B, T)."""
    cos, sin = rotary_angles(positions, q_BTHK.shape[-1], theta, scaling)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return rotate_pairs(q_BTHK, cos, sin), rotate_pairs(k_BTGK, cos, sin)


def visible_pairs(seqlen: int, window: int | None) -> int:
    """Count the (query, visible key) pairs of a sequence."""
    w = min(window or seqlen, seqlen)
    return w * (w + 1) // 2 + (seqlen - w) * w


def append(
    new_and_slots: list[tuple[Tensor, Tensor]], length_B: Tensor, rows: Tensor, lengths: Tensor
) -> None:
    """Write the tokens of a prefill, (n, T, ...) or packed (1, T, ...), to slots (B, S, ...).

    In place; a ring keeps the last S. `rows` and `lengths` come from `Prompts`. Only the device
    knows which tokens a ring drops. Such a token writes what the last token of its slot writes, so
    the order of the writes doesn't matter.
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


def append_step(new_and_slots: list[tuple[Tensor, Tensor]], slot_B: Tensor) -> None:
    """Write one token per row, (B, 1, ...), to its slot of (B, S, ...), in place."""
    row = torch.arange(len(slot_B), device=slot_B.device)
    for new, slots in new_and_slots:
        slots[row, slot_B] = new[:, 0].to(slots.dtype)
