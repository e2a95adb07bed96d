"""DeepSeek sparse attention (https://arxiv.org/abs/2512.02556): softmax attention over the top-k
keys that a lightning indexer picks for each query.

    I(t, s) = (J C)^-0.5 sum_j w(t, j) ReLU(q_I(t, j) . k_I(s))
    o_t = sum_s softmax(q_t . k_s K^-0.5) v_s        over the top_k visible s with the largest I

The indexer learns from its own loss, KL(p || softmax I), where p is the main attention's
distribution. In the first `warmup_steps` steps attention is dense and p covers all visible keys;
after that p covers the selected keys. The indexer's input is detached and a choice of keys has no
gradient, so neither loss reaches the other's weights. DeepSeek's code normalizes k_I with a
LayerNorm; here it is the RMSNorm of the rest of the model.

Shapes: B sequences, T tokens, D model dim, H query heads, G key/value heads, K head dim, J index
heads, C index dim, S slots of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.LT2.kernel.attention import attention
from apps.LT2.kernel.documents import local_positions
from apps.LT2.kernel.dsa import Index, dsa, dsa_step
from apps.LT2.mixers.attention import QKV, Attention, AttentionCache, append, append_step
from apps.LT2.mixers.base import Mixer, MixerArgs, OwnLoss, Past, Prompts, by_sequence
from apps.LT2.mixers.rotary import rotary_angles
from lingua.errors import UserError
from lingua.transformer import RMSNorm, check_sizes, init_linear, rotate_pairs


@dataclass
class DSAArgs:
    top_k: int = 2048  # keys that a query attends to
    n_index_heads: int = 4  # query heads of the indexer; they share one key head
    index_head_dim: int = 64  # dim of an index head
    warmup_steps: int = 0  # first optimizer steps with dense attention, while the indexer learns

    def __post_init__(self) -> None:
        check_sizes("model.dsa", self, "top_k", "n_index_heads")
        if self.index_head_dim < 2 or self.index_head_dim % 2:
            raise UserError(
                f"model.dsa.index_head_dim={self.index_head_dim} must be even and at least 2, as "
                "rotary embedding rotates pairs; e.g. 64"
            )
        if self.warmup_steps < 0:
            raise UserError(
                f"model.dsa.warmup_steps={self.warmup_steps} must be at least 0 (no warm-up)"
            )


class LightningIndexer(nn.Module):
    """Score keys cheaply: a few small heads, one shared key head, no softmax."""

    def __init__(self, shared: MixerArgs, own: DSAArgs):
        super().__init__()
        self.n_heads, self.head_dim = own.n_index_heads, own.index_head_dim
        self.rope_theta, self.rope_scaling = shared.rope_theta, shared.rope_scaling
        self.wq = nn.Linear(shared.dim, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(shared.dim, self.head_dim, bias=False)
        self.ww = nn.Linear(shared.dim, self.n_heads, bias=False)  # weights of the heads
        self.k_norm = RMSNorm(self.head_dim, shared.norm_eps)

    def forward(self, x_BTD: Tensor, positions: Tensor) -> Index:
        """Return queries and keys rotated to `positions`, (T,) or (B, T), and head weights."""
        x_BTD = x_BTD.detach()
        q_BTJC = self.wq(x_BTD).unflatten(-1, (self.n_heads, self.head_dim))
        k_BTC = self.k_norm(self.wk(x_BTD))
        cos, sin = rotary_angles(positions, self.head_dim, self.rope_theta, self.rope_scaling)
        q_BTJC = rotate_pairs(q_BTJC, cos.unsqueeze(-2), sin.unsqueeze(-2))
        w_BTJ = self.ww(x_BTD)
        w_BTJ = w_BTJ.to(torch.promote_types(w_BTJ.dtype, torch.float32))
        scale = (self.n_heads * self.head_dim) ** -0.5
        return Index(q_BTJC, rotate_pairs(k_BTC, cos, sin), w_BTJ * scale)

    def reset_parameters(self, init_std: float | None) -> None:
        for linear in (self.wq, self.wk, self.ww):
            init_linear(linear, init_std)
        self.k_norm.reset_parameters()

    def flops_per_token(self, seqlen: int) -> int:
        """Return the FLOPs of projections and of the scores of all visible keys."""
        projected = sum(linear.weight.numel() for linear in (self.wq, self.wk, self.ww))
        # (seqlen + 1) / 2 keys on average; two operations per product, and the sum over heads.
        return 2 * projected + self.n_heads * (self.head_dim + 1) * (seqlen + 1)


@dataclass
class DSACache(AttentionCache):
    index_k_BSC: Tensor

    def slots(self) -> tuple[Tensor, ...]:
        return *super().slots(), self.index_k_BSC

    def slots_of(self, k: Tensor, v: Tensor, index: Index) -> list[tuple[Tensor, Tensor]]:
        """Pair new keys, values and index keys with their slots."""
        return [(k, self.k_BSGK), (v, self.v_BSGK), (index.k_BSC, self.index_k_BSC)]


class SparseAttention(Attention):
    """Attention's projections, rotation and output gate, over the keys that an indexer picks."""

    module_name = "dsa"
    own_loss = OwnLoss("dsa_indexer", module="indexer")

    def __init__(self, shared: MixerArgs, own: DSAArgs):
        super().__init__(shared)
        self.top_k, self.warmup_steps = own.top_k, own.warmup_steps
        self.indexer = LightningIndexer(shared, own)
        self.dense = False  # in warm-up

    def begin_step(self, step: int | None) -> None:
        self.dense = step is not None and step < self.warmup_steps

    @property
    def phase(self) -> bool:
        return self.dense

    def forward(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        positions = local_positions(x_BTD.shape[1], cu_seqlens, x_BTD.device)
        qkv, index = self._qkv(x_BTD, positions), self.indexer(x_BTD, positions)
        return self._output(self._attend(qkv, index, cu_seqlens, dense=self.dense), x_BTD)

    def forward_with_loss(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        positions = local_positions(x_BTD.shape[1], cu_seqlens, x_BTD.device)
        qkv, index = self._qkv(x_BTD, positions), self.indexer(x_BTD, positions)
        top_k = None if self.dense else self.top_k
        o, loss = dsa(*qkv, index, top_k=top_k, cu_seqlens=cu_seqlens, with_loss=True)
        assert loss is not None
        return self._output(o, x_BTD), loss

    def init_cache(
        self, batch_size: int, max_seqlen: int, like: Tensor, window: int | None = None
    ) -> DSACache:
        base = super().init_cache(batch_size, max_seqlen, like)
        index_k = like.new_zeros(batch_size, max_seqlen, self.indexer.head_dim)
        return DSACache(**vars(base), index_k_BSC=index_k)

    def prefill(
        self, x_BTD: Tensor, cache: DSACache, prompts: Prompts, window: int | None = None
    ) -> Tensor:
        rows, lengths = prompts.rows_and_lengths(x_BTD)
        held = cache.length_B[rows]
        positions = prompts.positions(x_BTD, held)
        qkv, index = self._qkv(x_BTD, positions), self.indexer(x_BTD, positions)
        past = prompts.known_past(rows, held, lengths)
        if past:
            o = self._attend_past(qkv, index, cache, past)
        else:
            o = self._attend(qkv, index, prompts.cu_seqlens)
        append(cache.slots_of(*qkv[1:], index), cache.length_B, rows, lengths)
        return self._output(o, x_BTD)

    def step(self, x_B1D: Tensor, cache: DSACache) -> Tensor:
        positions = cache.length_B[:, None]
        qkv, index = self._qkv(x_B1D, positions), self.indexer(x_B1D, positions)
        append_step(cache.slots_of(*qkv[1:], index), cache.length_B)
        cache.length_B += 1
        index = index._replace(k_BSC=cache.index_k_BSC.type_as(index.k_BSC))
        k, v, n_valid = cache.k_BSGK, cache.v_BSGK, cache.length_B
        o = dsa_step(qkv[0][:, 0], k, v, index, n_valid, top_k=self.top_k)
        return self._output(o[:, None], x_B1D)

    # The indexer also reads the normed input.
    add_step, decode_linears = Mixer.add_step, Mixer.decode_linears

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        super().reset_parameters(init_std, factor)
        self.indexer.reset_parameters(init_std)

    def flops_per_token(self, seqlen: int, window: int | None = None) -> int:
        # A query attends to as many keys as in a window of top_k.
        attended = super().flops_per_token(seqlen, self.top_k)
        return attended + self.indexer.flops_per_token(seqlen)

    def state_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        index_keys = seqlen * self.indexer.head_dim * dtype.itemsize
        return super().state_bytes(seqlen, dtype) + index_keys

    def step_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        """Return the size of all index keys and of the keys and values that they pick."""
        index_keys = seqlen * self.indexer.head_dim * dtype.itemsize
        return super().state_bytes(min(seqlen, self.top_k), dtype) + index_keys

    def tp_plan(self) -> None:
        """Return None: all heads share one choice of keys, and the loss sums over the heads."""

    def _attend(
        self, qkv: QKV, index: Index, cu_seqlens: Tensor | None, *, dense: bool = False
    ) -> Tensor:
        """Attend within whole sequences, without the indexer's loss."""
        if dense or qkv[0].shape[1] <= self.top_k:  # nothing to choose
            return attention(*qkv, cu_seqlens=cu_seqlens, impl=self.attn_impl)
        return dsa(*qkv, index, top_k=self.top_k, cu_seqlens=cu_seqlens)[0]

    def _attend_past(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, qkv: QKV, index: Index, cache: DSACache, past: Past
    ) -> Tensor:
        """Attend from new tokens to cached and new ones, one sequence at a time."""
        outputs = []
        for (row, held, _), *parts in by_sequence(past, *qkv, *index):
            q_new, k_new, v_new, *index_new = (x[None] for x in parts)
            index_new = Index(*index_new)
            k_all, v_all, index_k_all = (
                torch.cat((slots[row : row + 1, :held].type_as(x), x), dim=1)
                for x, slots in cache.slots_of(k_new, v_new, index_new)
            )
            index_all = index_new._replace(k_BSC=index_k_all)
            outputs.append(dsa(q_new, k_all, v_all, index_all, top_k=self.top_k)[0][0])
        return torch.cat(outputs).view_as(qkv[0])
