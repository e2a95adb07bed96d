"""The native sparse attention layer: projections, gates, groups, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apps.LT2.mixers import Prompts
from apps.LT2.mixers.nsa import NativeSparseAttention, NSAArgs, chosen_pairs, complete_block_pairs
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.errors import UserError
from tests.LT2.mixers.paper import Weights, linear, softmax_heads

SIZES = {"block_size": 8, "n_blocks": 4, "window_size": 5}


def model_args(**changes) -> LoopedTransformerArgs:
    options = {"dim": 32, "n_heads": 16, "head_dim": 4, "vocab_size": 8, "n_layers": 1} | changes
    return LoopedTransformerArgs(**{"nsa": NSAArgs(**SIZES)} | options)


def make(**changes) -> NativeSparseAttention:
    torch.manual_seed(0)
    args = model_args(**changes)
    layer = NativeSparseAttention(args, args.nsa)
    layer.reset_parameters(None, 1.0)
    with torch.no_grad():
        layer.wg.weight.normal_(std=0.3)
    return layer


def definition(weights: Weights, args, x_TD: Tensor, window: int | None = None) -> Tensor:
    own, T = args.nsa, len(x_TD)
    n_kv_heads = args.n_kv_heads or args.n_heads // 16
    heads, group = softmax_heads(weights, args, x_TD, n_kv_heads), args.n_heads // n_kv_heads
    # The three gates of a head are adjacent, as in fla's layer.
    gates_TH3 = torch.sigmoid(x_TD @ weights["wg.weight"].T).view(T, args.n_heads, 3)
    o = [[] for _ in range(T)]
    for g in range(n_kv_heads):
        q_RTK = torch.stack([q for q, _, _ in heads[g * group : (g + 1) * group]])
        _, k, v = heads[g * group]
        for t in range(T):
            branches = branches_of(q_RTK[:, t], k[: t + 1], v[: t + 1], own)
            gates = gates_TH3[t, g * group : (g + 1) * group]
            gated = [gates[:, i, None] * branch for i, branch in enumerate(branches)]
            o[t].append(sum(gated).flatten())
    return linear(weights, "wo", torch.stack([torch.cat(row) for row in o]))[0]


def branches_of(q_RK: Tensor, k_SK: Tensor, v_SK: Tensor, own: NSAArgs) -> list[Tensor]:
    """Return what the heads of a group read from the past in each branch, (R, K) each."""

    def attend(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        p = (q_RK @ keys.T * q_RK.shape[1] ** -0.5).softmax(-1)
        return p @ values, p

    size, own_block = own.block_size, (len(k_SK) - 1) // own.block_size
    n_complete = len(k_SK) // size
    compressed, importance = torch.zeros_like(q_RK), []
    if n_complete:
        means = [x[: n_complete * size].view(n_complete, size, -1).mean(1) for x in (k_SK, v_SK)]
        compressed, p = attend(*means)
        importance = p.sum(0).tolist()
    read = {0, max(own_block - 1, 0), own_block}
    others = sorted(range(1, own_block - 1), key=lambda block: -importance[block])
    read |= set(others[: own.n_blocks - len(read)])
    chosen = [s for s in range(len(k_SK)) if s // size in read]
    selected, _ = attend(k_SK[chosen], v_SK[chosen])
    windowed, _ = attend(k_SK[-own.window_size :], v_SK[-own.window_size :])
    return [compressed, selected, windowed]


def test_branches_start_half_open():
    layer, x = make(), torch.randn(2, 40, 32)
    layer.reset_parameters(None, 1.0)
    *_, gates = layer._project(x, torch.arange(40))
    assert (gates == 0.5).all()


@pytest.mark.parametrize("n_heads, want", [(16, 1), (32, 2), (64, 4)])
def test_null_kv_heads_make_groups_of_16(n_heads, want):
    layer = make(n_heads=n_heads, n_kv_heads=None)
    assert layer.n_kv_heads == want
    assert layer.wk.weight.shape == (4 * want, 32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_heads": 8}, r"model\.n_heads=8"),
        ({"n_heads": 40}, r"model\.n_heads=40 .*model\.n_kv_heads=None"),
        ({"n_heads": 32, "n_kv_heads": 4}, r"model\.n_heads=32 .*model\.n_kv_heads=4"),
        ({"nsa": NSAArgs(n_blocks=2)}, r"model\.nsa\.n_blocks=2"),
        ({"nsa": NSAArgs(block_size=0)}, r"model\.nsa\.block_size=0"),
        ({"nsa": NSAArgs(window_size=0)}, r"model\.nsa\.window_size=0"),
        ({"head_dim": 3}, r"model\.head_dim=3"),
        ({"attn_impl": "sdpa"}, r"model\.attn_impl=sdpa"),
    ],
)
def test_unsupported_settings_are_user_errors(changes, message):
    with pytest.raises(UserError, match=message):
        LoopedTransformer(model_args(mixer="nsa", **changes))


@pytest.mark.parametrize("seqlen", [1, 7, 8, 9, 47, 200])
def test_pair_counts_equal_sums_over_tokens(seqlen):
    complete = sum((t + 1) // 8 for t in range(seqlen))
    assert complete_block_pairs(seqlen, 8) == complete
    chosen = sum(min(t // 8, 3) * 8 + t % 8 + 1 for t in range(seqlen))
    assert chosen_pairs(seqlen, 8, 4) == chosen


def test_decode_reads_only_chosen_blocks_and_the_window():
    """Other cached tokens may be NaN."""
    layer = make(nsa=NSAArgs(block_size=4, n_blocks=3, window_size=2))
    x = torch.randn(1, 41, 32)
    outputs = []
    with torch.no_grad():
        for junk in (0.0, float("nan")):
            cache = layer.init_cache(1, 41, like=x)
            layer.prefill(x[:, :40], cache, Prompts())
            for held in (cache.k_BSGK, cache.v_BSGK):
                held[:, 4:36] += junk  # blocks 0, 9 and 10 are read
            outputs.append(layer.step(x[:, 40:], cache))
    assert torch.equal(*outputs)
