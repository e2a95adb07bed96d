"""The native sparse attention layer: projections, gates, groups, errors."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.nsa import native_sparse_attention
from apps.LT2.mixers import Prompts
from apps.LT2.mixers.nsa import NativeSparseAttention, NSAArgs, chosen_pairs, complete_block_pairs
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.errors import UserError
from lingua.transformer import precompute_freqs_cis
from tests.tolerances import FP32, assert_same

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


def rotate(x_THK, theta):
    """Rotate pairs (x[2i], x[2i+1]) by t * theta ** (-2i / K)."""
    matrices = precompute_freqs_cis(x_THK.shape[-1], len(x_THK), theta)
    return torch.einsum("tpij,thpj->thpi", matrices, x_THK.unflatten(-1, (-1, 2))).flatten(-2)


@pytest.mark.parametrize("n_heads, n_kv_heads", [(16, 1), (32, 2)])
def test_layer_is_gated_sparse_attention_of_its_projections(n_heads, n_kv_heads):
    layer = make(n_heads=n_heads, n_kv_heads=n_kv_heads, rope_theta=100.0)
    x_TD = torch.randn(70, 32)
    q = rotate((x_TD @ layer.wq.weight.T).view(70, n_heads, 4), 100.0)
    k = rotate((x_TD @ layer.wk.weight.T).view(70, n_kv_heads, 4), 100.0)
    v = (x_TD @ layer.wv.weight.T).view(70, n_kv_heads, 4)
    # The three gates of a head are adjacent, as in fla's layer.
    gates = 1 / (1 + torch.exp(-(x_TD @ layer.wg.weight.T).view(70, n_heads, 3)))
    o = native_sparse_attention(*(y[None] for y in (q, k, v, gates)), **SIZES, impl="naive")
    assert_same(layer(x_TD[None])[0], o[0].flatten(1) @ layer.wo.weight.T, FP32)


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
