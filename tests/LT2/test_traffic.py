"""Bytes that a decode step must move, counted by hand."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.flops import step_traffic
from apps.LT2.inference.load import cast_for_inference
from apps.LT2.mixers.dsa import DSAArgs
from apps.LT2.mixers.nsa import NSAArgs
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs

VOCAB, DIM, HEADS, LAYERS, FFN, LOOPS = 50, 32, 2, 5, 96, 4


def make(**changes) -> LoopedTransformer:
    args = {"dim": DIM, "n_heads": HEADS, "n_layers": LAYERS, "multiple_of": 32, "mixer": "gdn"}
    args |= {"vocab_size": VOCAB, "loop_count": LOOPS, **changes}
    with torch.device("meta"):
        model = LoopedTransformer(LoopedTransformerArgs(**args))
    cast_for_inference(model, torch.bfloat16)
    return model


FEED_FORWARD = 2 * 3 * DIM * FFN + 4 * 2 * DIM  # matrices in bf16; two norms in fp32
ATTENTION = 2 * 4 * DIM * DIM
KEY, VALUE = 12, 24
GDN = 2 * (6 * DIM * DIM + 2 * DIM * HEADS) + 4 * (
    2 * HEADS + 4 * HEADS * (2 * KEY + VALUE) + VALUE  # A_log, dt_bias; convolutions; norm
)
GDN_CACHE = 4 * HEADS * KEY * VALUE + 2 * 3 * HEADS * (2 * KEY + VALUE)  # state fp32; tail


@pytest.mark.parametrize("weight_tying", [False, True])
def test_a_hybrid_by_hand(weight_tying):
    model = make(attention_pattern="4:1", weight_tying=weight_tying)
    batch_size, seqlen = 3, 100
    got = step_traffic(model, batch_size, seqlen, torch.bfloat16)
    stack = LAYERS * FEED_FORWARD + 4 * GDN + ATTENTION
    assert got.weights == LOOPS * stack + 4 * LOOPS * DIM  # and rho
    assert got.head == 2 * VOCAB * DIM + 4 * DIM + 2 * batch_size * DIM
    keys_and_values = 2 * 2 * DIM * seqlen
    assert got.caches == batch_size * LOOPS * (4 * 2 * GDN_CACHE + keys_and_values)
    assert got.total == got.weights + got.head + got.caches


@pytest.mark.parametrize("seqlen, seen", [(5, 5), (7, 7), (100, 7)])
def test_a_window_reads_what_it_sees(seqlen, seen):
    model = make(mixer="window", default_sliding_window=7)
    got = step_traffic(model, 1, seqlen, torch.bfloat16)
    assert got.caches == LOOPS * LAYERS * 2 * 2 * DIM * seen


@pytest.mark.parametrize("seqlen, attended", [(5, 5), (40, 16)])
def test_dsa_reads_all_index_keys_and_the_keys_they_pick(seqlen, attended):
    model = make(mixer="dsa", dsa=DSAArgs(top_k=16, n_index_heads=1, index_head_dim=8))
    got = step_traffic(model, 2, seqlen, torch.bfloat16)
    assert got.caches == 2 * LOOPS * LAYERS * 2 * (8 * seqlen + 2 * DIM * attended)


# means of complete blocks, chosen keys, keys of the window
@pytest.mark.parametrize("seqlen, read", [(5, 1 + 5 + 5), (9, 2 + 9 + 6), (40, 10 + 12 + 6)])
def test_nsa_reads_means_chosen_blocks_and_a_window(seqlen, read):
    nsa = NSAArgs(block_size=4, n_blocks=3, window_size=6)
    model = make(mixer="nsa", n_heads=16, nsa=nsa)  # one key/value head of width 2
    got = step_traffic(model, 2, seqlen, torch.bfloat16)
    assert got.caches == 2 * LOOPS * LAYERS * 2 * 2 * 2 * read


def test_a_loop_reads_the_mixer_that_it_runs():
    """Layers that hold two mixers read one of them in each loop."""
    model = make(attention_pattern="gdn->full->full->full", use_residual=False)
    got = step_traffic(model, 1, 1, torch.bfloat16).weights
    assert got == LAYERS * (LOOPS * FEED_FORWARD + GDN + 3 * ATTENTION)


def test_loops_cost_weights_and_batches_do_not():
    once, thrice = make(loop_count=1, use_residual=False), make(loop_count=3, use_residual=False)
    small, large = (step_traffic(once, b, 64, torch.float32) for b in (1, 8))
    assert step_traffic(thrice, 1, 64, torch.float32).weights == 3 * small.weights
    assert large.weights == small.weights
    assert large.caches == 8 * small.caches
