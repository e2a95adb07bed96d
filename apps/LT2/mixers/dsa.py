"""DeepSeek sparse attention (https://arxiv.org/abs/2512.02556): softmax attention over the top-k
keys that a lightning indexer picks for each query.

    I(t, s) = sum_j w(t, j) ReLU(q_I(t, j) . k_I(s))

The indexer learns from a loss of its own, KL(p || softmax I): p is the main attention's
distribution, over all visible keys in the first `warmup_steps` steps, when attention is dense, and
over the selected keys after. Its input is detached and a choice of keys has no gradient, so neither
loss reaches the other's weights. DeepSeek's code normalises k_I with a LayerNorm; here it is the
RMSNorm of the rest of the model.

Shapes: B sequences, T tokens, D model width, H query heads, G key/value heads, K head width,
J index heads, C index width, S slots of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.LT2.kernel.attention import attention
from apps.LT2.kernel.documents import local_positions
from apps.LT2.kernel.dsa import Index, dsa, dsa_step
from apps.LT2.mixers.attention import Attention, AttentionCache, append
from apps.LT2.mixers.base import Extension, MixerArgs, cache_positions, cache_rows, known_past
from lingua.errors import UserError
from lingua.transformer import RMSNorm, init_linear, rotary_angles, rotate_pairs


@dataclass
class DSAArgs:
    top_k: int = 2048  # keys that a query attends to
    n_index_heads: int = 4  # query heads of the indexer; they share one key head
    index_head_dim: int = 64  # width of an index head
    warmup_steps: int = 0  # first optimizer steps: dense attention, while the indexer learns

    def __post_init__(self) -> None:
        for name in ("top_k", "n_index_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.dsa.{name}={getattr(self, name)} must be at least 1")
        if self.index_head_dim < 2 or self.index_head_dim % 2:
            raise UserError(
                f"model.dsa.index_head_dim={self.index_head_dim} must be even and at least 2, "
                "since rotary embedding turns pairs; e.g. 64"
            )
        if self.warmup_steps < 0:
            raise UserError(
                f"model.dsa.warmup_steps={self.warmup_steps} must be 0 (sparse from the start) "
                "or more"
            )


class LightningIndexer(nn.Module):
    """Scores keys cheaply: a few narrow heads, one shared key head, no softmax."""

    def __init__(self, shared: MixerArgs, own: DSAArgs):
        super().__init__()
        self.n_heads, self.head_dim = own.n_index_heads, own.index_head_dim
        self.rope_theta = shared.rope_theta
        self.wq = nn.Linear(shared.dim, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(shared.dim, self.head_dim, bias=False)
        self.ww = nn.Linear(shared.dim, self.n_heads, bias=False)  # weights of the heads
        self.k_norm = RMSNorm(self.head_dim, shared.norm_eps)

    def forward(self, x_BTD: Tensor, positions: Tensor) -> Index:
        """Queries and keys rotated to `positions`, (T,) or (B, T)."""
        x_BTD = x_BTD.detach()
        q_BTJC = self.wq(x_BTD).unflatten(-1, (self.n_heads, self.head_dim))
        k_BTC = self.k_norm(self.wk(x_BTD))
        cos, sin = rotary_angles(positions, self.head_dim, self.rope_theta)
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
        """Projections, and the scores of all visible keys: q k and the sum over heads."""
        projected = sum(linear.weight.numel() for linear in (self.wq, self.wk, self.ww))
        # (seqlen + 1) / 2 keys on average, two operations for each product.
        return 2 * projected + self.n_heads * (self.head_dim + 1) * (seqlen + 1)


@dataclass
class DSACache(AttentionCache):
    index_k_BSC: Tensor


class SparseAttention(Attention):
    """Attention's projections, rotation and output gate, around another choice of keys."""

    module_name = "dsa"
    loss_name = "dsa_indexer"

    def __init__(self, shared: MixerArgs, own: DSAArgs):
        super().__init__(shared)
        self.top_k, self.warmup_steps = own.top_k, own.warmup_steps
        self.indexer = LightningIndexer(shared, own)
        self.dense = False  # in warm-up

    def split_counts(self) -> None:
        """Not split: all heads share one choice of keys, and the indexer's loss sums over them."""
        return None

    def begin_step(self, step: int | None) -> None:
        self.dense = step is not None and step < self.warmup_steps

    def forward(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        assert window is None, "sparse attention has no window"
        positions = local_positions(x_BTD.shape[1], cu_seqlens, x_BTD.device)
        q, k, v = self._qkv(x_BTD, positions)
        index = self.indexer(x_BTD, positions)
        o = self._attend(q, k, v, index, cu_seqlens, dense=self.dense)
        return self._output(o, x_BTD)

    def forward_with_loss(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        assert window is None, "sparse attention has no window"
        positions = local_positions(x_BTD.shape[1], cu_seqlens, x_BTD.device)
        q, k, v = self._qkv(x_BTD, positions)
        index = self.indexer(x_BTD, positions)
        top_k = None if self.dense else self.top_k
        o, loss = dsa(q, k, v, index, top_k=top_k, cu_seqlens=cu_seqlens, with_loss=True)
        assert loss is not None
        return self._output(o, x_BTD), loss

    def own_loss_parameters(self) -> list[nn.Parameter]:
        return list(self.indexer.parameters())

    def init_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        window: int | None = None,
    ) -> DSACache:
        assert window is None, "sparse attention has no window"
        base = super().init_cache(batch_size, max_seqlen, device=device, dtype=dtype)
        shape = (batch_size, max_seqlen, self.indexer.head_dim)
        return DSACache(**vars(base), index_k_BSC=torch.zeros(shape, device=device, dtype=dtype))

    def prefill(
        self,
        x_BTD: Tensor,
        cache: DSACache,
        *,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
        window: int | None = None,
        past: Sequence[Extension] | None = None,
    ) -> Tensor:
        assert window is None, "sparse attention has no window"
        rows, lengths = cache_rows(x_BTD, cu_seqlens, rows)
        starts = cache.length_B[rows]
        positions = cache_positions(x_BTD, cu_seqlens, starts)
        q, k, v = self._qkv(x_BTD, positions)
        index = self.indexer(x_BTD, positions)
        past = known_past(past, rows, starts, lengths)
        if past:
            o = self._continue(q, k, v, index, cache, past)
        else:
            o = self._attend(q, k, v, index, cu_seqlens)
        append(
            [(k, cache.k_BSGK), (v, cache.v_BSGK), (index.k_BSC, cache.index_k_BSC)],
            cache.length_B,
            rows,
            lengths,
        )
        return self._output(o, x_BTD)

    def step(self, x_B1D: Tensor, cache: DSACache) -> Tensor:
        positions = cache.length_B[:, None]
        q, k, v = self._qkv(x_B1D, positions)
        index = self.indexer(x_B1D, positions)
        batch = torch.arange(x_B1D.shape[0], device=x_B1D.device)
        for new, slots in (
            (k, cache.k_BSGK),
            (v, cache.v_BSGK),
            (index.k_BSC, cache.index_k_BSC),
        ):
            slots[batch, cache.length_B] = new[:, 0].to(slots.dtype)
        cache.length_B += 1
        index = index._replace(k_BSC=cache.index_k_BSC.type_as(index.k_BSC))
        o = dsa_step(q[:, 0], cache.k_BSGK, cache.v_BSGK, index, cache.length_B, top_k=self.top_k)
        return self._output(o[:, None], x_B1D)

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        super().reset_parameters(init_std, factor)
        self.indexer.reset_parameters(init_std)

    def flops_per_token(self, seqlen: int, window: int | None = None) -> int:
        # Attention is paid for the keys that are attended to, as many as in a window of top_k.
        attended = super().flops_per_token(seqlen, self.top_k)
        return attended + self.indexer.flops_per_token(seqlen)

    def state_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        index_keys = seqlen * self.indexer.head_dim * dtype.itemsize
        return super().state_bytes(seqlen, dtype) + index_keys

    def step_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        """All keys of the indexer, and the keys and values that it picks."""
        index_keys = seqlen * self.indexer.head_dim * dtype.itemsize
        return super().state_bytes(min(seqlen, self.top_k), dtype) + index_keys

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Index,
        cu_seqlens: Tensor | None,
        *,
        dense: bool = False,
    ) -> Tensor:
        """Attention of whole sequences, with no loss of the indexer."""
        if dense or q.shape[1] <= self.top_k:  # nothing to choose
            return attention(q, k, v, cu_seqlens=cu_seqlens, impl=self.attn_impl)
        return dsa(q, k, v, index, top_k=self.top_k, cu_seqlens=cu_seqlens)[0]

    def _continue(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Index,
        cache: DSACache,
        past: Sequence[Extension],
    ) -> Tensor:
        """Attention of new tokens over what is cached and over themselves, sequence by sequence."""
        sizes = [extension.new for extension in past]
        new = [x.flatten(0, 1).split(sizes) for x in (q, k, v, *index)]
        pieces = []
        for (row, held, n_new), *parts in zip(past, *new, strict=True):
            if not n_new:
                continue
            q_new, k_new, v_new, index_q, index_k, index_w = (x[None] for x in parts)
            cached = slice(row, row + 1), slice(0, held)
            k_all, v_all, index_k_all = (
                torch.cat((slots[cached].type_as(x), x), dim=1)
                for slots, x in (
                    (cache.k_BSGK, k_new),
                    (cache.v_BSGK, v_new),
                    (cache.index_k_BSC, index_k),
                )
            )
            index_new = Index(index_q, index_k_all, index_w)
            pieces.append(dsa(q_new, k_all, v_all, index_new, top_k=self.top_k)[0][0])
        return torch.cat(pieces).view_as(q)
