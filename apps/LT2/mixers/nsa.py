"""Native sparse attention (https://arxiv.org/abs/2502.11089): three views of the past, gated.

    o_t = g_cmp attend(means of blocks) + g_slc attend(chosen blocks) + g_win attend(window)

Keys and values of `block_size` tokens are averaged into one (the paper learns an MLP for this; the
mean is what fla does, and it has no parameters): a query sees the blocks that are complete. Their
softmax weights, summed over the query heads of a key/value head, say which `n_blocks` blocks the
second branch reads in full. The first block, the query's own and the one before it are always
among them. The third branch sees the last `window_size` tokens. The gates are sigmoids of a
projection of the layer's input, one a query head and branch, zero at the start: all branches begin
half open. The branches share q, k and v, with rotary positions.

All query heads of a key/value head choose the same blocks, and a kernel reads these once for all:
there must be 16 of them at least. `model.n_kv_heads: null` is n_heads / 16 here.

Shapes: B sequences, T tokens, D model width, H query heads, G key/value heads, K head width, S
slots of a cache, C blocks of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.LT2.kernel.attention import check_attention_impl
from apps.LT2.kernel.documents import local_positions
from apps.LT2.kernel.nsa import (
    ALWAYS_CHOSEN,
    block_means,
    native_sparse_attention,
    native_sparse_attention_step,
)
from apps.LT2.mixers.attention import Attention, AttentionCache, append, rotate_heads, visible_pairs
from apps.LT2.mixers.base import (
    Extension,
    Mixer,
    MixerArgs,
    cache_positions,
    cache_rows,
    known_past,
)
from lingua.errors import UserError
from lingua.transformer import (
    check_rotary_width,
    check_sizes,
    fused_linear,
    init_linear,
    resolve_heads,
)

MIN_GROUP = 16  # query heads for a key/value head: rows of a tensor core's tile


@dataclass
class NSAArgs:
    block_size: int = 64  # tokens of a block; CUDA kernels need a power of two, 16 or more
    n_blocks: int = 16  # blocks that a query reads, 3 or more; on CUDA block_size / 2 at most
    window_size: int = 512  # keys of the window branch, the token itself included


@dataclass
class NSACache(AttentionCache):
    """Keys and values as in a full layer, in whole blocks of slots, and the means of the blocks."""

    k_BCGK: Tensor
    v_BCGK: Tensor


class NativeSparseAttention(Mixer):
    module_name = "nsa"
    reads = Attention.reads - {"gated_attn"}  # its branches have gates of their own
    zero_at_start = ("wg.weight",)

    def __init__(self, shared: MixerArgs, own: NSAArgs):
        super().__init__(shared, own)
        self.n_heads, self.n_kv_heads, self.head_dim = grouped_heads(shared)
        check_rotary_width(self.head_dim)
        check_attention_impl(shared.attn_impl, windowed=True)
        check_sizes("model.nsa", own, "block_size", "window_size")
        if own.n_blocks < ALWAYS_CHOSEN:
            raise UserError(
                f"model.nsa.n_blocks={own.n_blocks} must be at least {ALWAYS_CHOSEN}: the "
                "first block, the query's own and the one before it are always chosen"
            )
        self.nsa, self.rope_theta, self.attn_impl = own, shared.rope_theta, shared.attn_impl
        self.wq = nn.Linear(shared.dim, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(shared.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(shared.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wg = nn.Linear(shared.dim, 3 * self.n_heads, bias=False)  # three gates a head
        self.wo = nn.Linear(self.n_heads * self.head_dim, shared.dim, bias=False)

    def forward(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        assert window is None, "nsa has a window of its own, model.nsa.window_size"
        positions = local_positions(x_BTD.shape[1], cu_seqlens, x_BTD.device)
        return self._output(self._attend(*self._project(x_BTD, positions), cu_seqlens=cu_seqlens))

    def init_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        window: int | None = None,
    ) -> NSACache:
        n_blocks = self._cache_blocks(max_seqlen)

        def zeros(length: int) -> Tensor:
            shape = (batch_size, length, self.n_kv_heads, self.head_dim)
            return torch.zeros(shape, device=device, dtype=dtype)

        n_slots = n_blocks * self.nsa.block_size
        length_B = torch.zeros(batch_size, device=device, dtype=torch.int64)
        return NSACache(zeros(n_slots), zeros(n_slots), length_B, zeros(n_blocks), zeros(n_blocks))

    def prefill(
        self,
        x_BTD: Tensor,
        cache: NSACache,
        *,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
        window: int | None = None,
        past: Sequence[Extension] | None = None,
    ) -> Tensor:
        rows, lengths = cache_rows(x_BTD, cu_seqlens, rows)
        starts = cache.length_B[rows]
        past = known_past(past, rows, starts, lengths)
        q, k, v, gates = self._project(x_BTD, cache_positions(x_BTD, cu_seqlens, starts))
        append([(k, cache.k_BSGK), (v, cache.v_BSGK)], cache.length_B, rows, lengths)
        cache.k_BCGK[rows] = block_means(cache.k_BSGK[rows], self.nsa.block_size)
        cache.v_BCGK[rows] = block_means(cache.v_BSGK[rows], self.nsa.block_size)
        if past:
            o = self._attend_past(q, gates, cache, past)
        else:
            o = self._attend(q, k, v, gates, cu_seqlens=cu_seqlens)
        return self._output(o)

    def step(self, x_B1D: Tensor, cache: NSACache) -> Tensor:
        q, k, v, gates = self._project(x_B1D, cache.length_B[:, None])
        o = native_sparse_attention_step(
            q[:, 0],
            k[:, 0],
            v[:, 0],
            gates[:, 0],
            (cache.k_BSGK, cache.v_BSGK, cache.k_BCGK, cache.v_BCGK),
            cache.length_B % cache.k_BSGK.shape[1],
            n_blocks=self.nsa.n_blocks,
            window_size=self.nsa.window_size,
        )
        cache.length_B += 1
        return self._output(o[:, None])

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        for linear in (self.wq, self.wk, self.wv):
            init_linear(linear, init_std)
        nn.init.zeros_(self.wg.weight)  # sigmoid(0): every branch starts half open
        init_linear(self.wo, init_std, factor)

    def flops_per_token(self, seqlen: int, window: int | None = None) -> int:
        products = sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        pairs = (
            complete_block_pairs(seqlen, self.nsa.block_size)
            + chosen_pairs(seqlen, self.nsa.block_size, self.nsa.n_blocks)
            + visible_pairs(seqlen, self.nsa.window_size)
        )
        return products + 4 * self.n_heads * self.head_dim * pairs // seqlen

    def state_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        per_block = 2 * (self.nsa.block_size + 1) * self.n_kv_heads * self.head_dim
        return self._cache_blocks(seqlen) * per_block * dtype.itemsize

    def step_bytes(self, seqlen: int, dtype: torch.dtype, window: int | None = None) -> int:
        """What the three branches read, each by itself; the means of complete blocks only."""
        block = self.nsa.block_size
        read = (
            seqlen // block
            + min(self.nsa.n_blocks * block, seqlen)
            + min(self.nsa.window_size, seqlen)
        )
        return 2 * read * self.n_kv_heads * self.head_dim * dtype.itemsize

    def _cache_blocks(self, max_seqlen: int) -> int:
        return -(-max_seqlen // self.nsa.block_size)

    def _project(self, x_BTD: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (B, T, heads, K), q and k turned to `positions`, and gates (B, T, H, 3)."""
        *qkv, gates = fused_linear(x_BTD, self.fused_linears())
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv)
        gates = torch.sigmoid(gates).unflatten(-1, (self.n_heads, 3))
        return *rotate_heads(q, k, positions, self.rope_theta), v, gates

    def fused_linears(self) -> tuple[nn.Linear, ...]:
        return (self.wq, self.wk, self.wv, self.wg)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        return native_sparse_attention(
            q,
            k,
            v,
            gates,
            block_size=self.nsa.block_size,
            n_blocks=self.nsa.n_blocks,
            window_size=self.nsa.window_size,
            cu_seqlens=cu_seqlens,
            attn_impl=self.attn_impl,
        )

    def _attend_past(
        self, q: Tensor, gates: Tensor, cache: NSACache, past: Sequence[Extension]
    ) -> Tensor:
        """New tokens, already stored, over all that is cached of their row; row by row."""
        sizes = [extension.new for extension in past]
        new = (x.flatten(0, 1).split(sizes) for x in (q, gates))
        pieces = []
        for (row, held, n_new), q_row, gates_row in zip(past, *new, strict=True):
            if n_new:
                seen = slice(0, held + n_new)
                k, v = (x[row, seen].type_as(q)[None] for x in (cache.k_BSGK, cache.v_BSGK))
                pieces.append(self._attend(q_row[None], k, v, gates_row[None])[0])
        return torch.cat(pieces).view_as(q)

    def _output(self, o_BTHK: Tensor) -> Tensor:
        return self.wo(o_BTHK.flatten(2))


def grouped_heads(shared: MixerArgs) -> tuple[int, int, int]:
    """(query heads, key/value heads, head width) of nsa; UserError where groups are too small."""
    n_heads, n_kv_heads, head_dim = resolve_heads(shared)
    if n_heads < MIN_GROUP:
        raise UserError(
            f"model.n_heads={n_heads}: nsa needs at least {MIN_GROUP} query heads for each "
            f"key/value head; use n_heads={MIN_GROUP} with n_kv_heads=1 (and model.head_dim)"
        )
    if shared.n_kv_heads is None:
        if n_heads % MIN_GROUP:
            raise UserError(
                f"model.n_kv_heads=null is n_heads / {MIN_GROUP} for nsa, and {MIN_GROUP} does not "
                f"divide model.n_heads={n_heads}; set model.n_kv_heads, 1 for example"
            )
        n_kv_heads = n_heads // MIN_GROUP
    if n_heads // n_kv_heads < MIN_GROUP:
        raise UserError(
            f"model.n_kv_heads={n_kv_heads} gives each {n_heads // n_kv_heads} of the "
            f"model.n_heads={n_heads} query heads, and nsa needs {MIN_GROUP} or more; "
            f"use n_kv_heads={n_heads // MIN_GROUP} or fewer, or null"
        )
    return n_heads, n_kv_heads, head_dim


def complete_block_pairs(seqlen: int, block_size: int) -> int:
    """Complete blocks that the queries of a sequence see, over all of them."""
    n_complete, rest = divmod(seqlen, block_size)
    return block_size * n_complete * (n_complete - 1) // 2 + n_complete * (rest + 1)


def chosen_pairs(seqlen: int, block_size: int, n_blocks: int) -> int:
    """Keys in the chosen blocks, up to each query itself, over all queries of a sequence."""
    n_complete, rest = divmod(seqlen, block_size)
    in_own_block = n_complete * visible_pairs(block_size, None) + visible_pairs(rest, None)
    # Query t of block b reads min(b, n_blocks - 1) other blocks, all of them whole.
    others = block_size * sum(min(b, n_blocks - 1) for b in range(n_complete))
    return in_own_block + block_size * (others + rest * min(n_complete, n_blocks - 1))
