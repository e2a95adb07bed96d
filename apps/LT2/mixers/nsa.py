"""Native sparse attention (https://arxiv.org/abs/2502.11089): three views of the past, gated.

    o_t = g_cmp attend(means of blocks) + g_slc attend(chosen blocks) + g_win attend(window)

Each branch is softmax attention with scale K^-0.5. The first attends to the mean key and value of
each complete block of `block_size` tokens. (The paper learns an MLP for this; fla takes the mean,
which has no parameters.) Its softmax weights, summed over the query heads of a key/value head,
choose the `n_blocks` blocks that the second branch reads. The first block, the query's own and the
one before it are always chosen. The third branch sees the last `window_size` tokens. The gates are
sigmoids of a projection of the input, one per query head and branch, half open at the start. The
branches share q, k and v, with rotary positions.

All query heads of a key/value head choose the same blocks, and a kernel reads these once for all
of them. So a key/value head needs 16 query heads or more; `model.n_kv_heads: null` is n_heads / 16.

Shapes: B sequences, T tokens, D model dim, H query heads, G key/value heads, K head dim, S slots
of a cache, C blocks of it.
"""

from __future__ import annotations

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
    update_means,
)
from apps.LT2.kernel.skipped_loops import SkippedLoops
from apps.LT2.mixers.attention import (
    Attention,
    AttentionCache,
    append,
    qk_norms,
    resolve_biases,
    rotate_heads,
    visible_pairs,
)
from apps.LT2.mixers.base import Mixer, MixerArgs, Prompts, by_sequence
from lingua.errors import UserError
from lingua.transformer import (
    Linear,
    check_rotary_dim,
    check_sizes,
    fused_linear,
    init_linear,
    resolve_heads,
)

MIN_GROUP = 16  # query heads per key/value head: the rows of a tensor core's tile


@dataclass
class NSAArgs:
    block_size: int = 64  # tokens of a block
    n_blocks: int = 16  # blocks that a query reads, 3 or more
    window_size: int = 512  # keys of the window branch, the token itself included


@dataclass
class NSACache(AttentionCache):
    """Keys and values in whole blocks of slots, and the means of the blocks."""

    k_BCGK: Tensor
    v_BCGK: Tensor

    def copy_last(self, source: AttentionCache, skipped: SkippedLoops) -> bool:
        super().copy_last(source, skipped)
        skipped.after.append(self._update_means)
        return True

    def _update_means(self) -> None:
        update_means(self.k_BSGK, self.k_BCGK, self.length_B - 1)
        update_means(self.v_BSGK, self.v_BCGK, self.length_B - 1)


class NativeSparseAttention(Mixer):
    module_name = "nsa"
    uses_fla = False
    reads = Attention.reads - {"gated_attn"}  # it has its own gates
    zero_at_start = Attention.zero_at_start

    def __init__(self, shared: MixerArgs, own: NSAArgs):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = grouped_heads(shared)
        check_rotary_dim(self.head_dim)
        check_attention_impl(shared.attn_impl, windowed=True)
        check_sizes("model.nsa", own, "block_size", "window_size")
        if own.n_blocks < ALWAYS_CHOSEN:
            raise UserError(
                f"model.nsa.n_blocks={own.n_blocks} must be at least {ALWAYS_CHOSEN}: the "
                "first block, the query's own and the one before it are always chosen"
            )
        self.nsa, self.attn_impl = own, shared.attn_impl
        self.rope_theta, self.rope_scaling = shared.rope_theta, shared.rope_scaling
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        qkv_bias, output_bias = resolve_biases(shared)
        self.wq = Linear(shared.dim, queries, bias=qkv_bias)
        self.wk = Linear(shared.dim, keys, bias=qkv_bias)
        self.wv = Linear(shared.dim, keys, bias=qkv_bias)
        self.wg = nn.Linear(shared.dim, 3 * self.n_heads, bias=False)  # three gates per head
        self.wo = Linear(queries, shared.dim, bias=output_bias)
        self.q_norm, self.k_norm = qk_norms(shared, self.head_dim)

    def forward(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        positions = local_positions(x_BTD.shape[1], cu_seqlens, x_BTD.device)
        return self._output(self._attend(*self._project(x_BTD, positions), cu_seqlens=cu_seqlens))

    def init_cache(
        self, batch_size: int, max_seqlen: int, like: Tensor, window: int | None = None
    ) -> NSACache:
        n_blocks = self._cache_blocks(max_seqlen)
        slots = (batch_size, n_blocks * self.nsa.block_size, self.n_kv_heads, self.head_dim)
        blocks = (batch_size, n_blocks, self.n_kv_heads, self.head_dim)
        return NSACache(
            like.new_zeros(slots),
            like.new_zeros(slots),
            like.new_zeros(batch_size, dtype=torch.int64),
            like.new_zeros(blocks),
            like.new_zeros(blocks),
        )

    def prefill(
        self, x_BTD: Tensor, cache: NSACache, prompts: Prompts, window: int | None = None
    ) -> Tensor:
        rows, lengths = prompts.rows_and_lengths(x_BTD)
        held = cache.length_B[rows]
        past = prompts.known_past(rows, held, lengths)
        q, k, v, gates = self._project(x_BTD, prompts.positions(x_BTD, held))
        append([(k, cache.k_BSGK), (v, cache.v_BSGK)], cache.length_B, rows, lengths)
        cache.k_BCGK[rows] = block_means(cache.k_BSGK[rows], self.nsa.block_size)
        cache.v_BCGK[rows] = block_means(cache.v_BSGK[rows], self.nsa.block_size)
        if not past:
            return self._output(self._attend(q, k, v, gates, cu_seqlens=prompts.cu_seqlens))
        # New tokens, already stored, attend to all cached tokens of their row, row by row.
        outputs = []
        for (row, n_held, n_new), q_row, gates_row in by_sequence(past, q, gates):
            seen = slice(0, n_held + n_new)
            k, v = (x[row, seen].type_as(q)[None] for x in (cache.k_BSGK, cache.v_BSGK))
            outputs.append(self._attend(q_row[None], k, v, gates_row[None])[0])
        return self._output(torch.cat(outputs).view_as(q))

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

    def fused_linears(self) -> tuple[nn.Linear, ...]:
        return (self.wq, self.wk, self.wv, self.wg)

    def reset_parameters(self, init_std: float | None, factor: float) -> None:
        for linear in (self.wq, self.wk, self.wv):
            init_linear(linear, init_std)
        nn.init.zeros_(self.wg.weight)  # sigmoid(0): every branch starts half open
        init_linear(self.wo, init_std, factor)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

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
        """Return what the three branches read separately; of the means, only complete blocks."""
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
        """Return q, k, v (B, T, heads, K) and gates (B, T, H, 3); q and k are rotated."""
        *qkv, gates = fused_linear(x_BTD, self.fused_linears())
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        gates = torch.sigmoid(gates).unflatten(-1, (self.n_heads, 3))
        return *rotate_heads(q, k, positions, self.rope_theta, self.rope_scaling), v, gates

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

    def _output(self, o_BTHK: Tensor) -> Tensor:
        return self.wo(o_BTHK.flatten(2))


def grouped_heads(shared: MixerArgs) -> tuple[int, int, int]:
    """Return (query heads, key/value heads, head dim); UserError if the groups are too small."""
    n_heads, n_kv_heads, head_dim = resolve_heads(shared)
    if shared.n_kv_heads is None and n_heads % MIN_GROUP == 0:
        n_kv_heads = n_heads // MIN_GROUP
    if n_heads < n_kv_heads * MIN_GROUP:
        raise UserError(
            f"model.n_heads={n_heads} with model.n_kv_heads={shared.n_kv_heads}: nsa needs "
            f"{MIN_GROUP} or more query heads per key/value head; use a multiple of {MIN_GROUP} as "
            "n_heads, with n_kv_heads=null"
        )
    return n_heads, n_kv_heads, head_dim


def complete_block_pairs(seqlen: int, block_size: int) -> int:
    """Count the (query, complete block) pairs of a sequence."""
    n_complete, rest = divmod(seqlen, block_size)
    return block_size * n_complete * (n_complete - 1) // 2 + n_complete * (rest + 1)


def chosen_pairs(seqlen: int, block_size: int, n_blocks: int) -> int:
    """Count the (query, key in a chosen block) pairs of a sequence."""
    n_complete, rest = divmod(seqlen, block_size)
    in_own_block = n_complete * visible_pairs(block_size, None) + visible_pairs(rest, None)
    # A query of block b reads min(b, n_blocks - 1) other blocks, each whole.
    others = block_size * sum(min(b, n_blocks - 1) for b in range(n_complete))
    return in_own_block + block_size * (others + rest * min(n_complete, n_blocks - 1))
