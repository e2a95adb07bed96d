"""FLOPs, parameters and bytes, checked against hooks on a running model and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apps.LT2.flops import (
    cache_bytes,
    count_parameters,
    forward_flops_per_token,
    step_traffic,
    train_flops_per_token,
)
from apps.LT2.inference.load import cast_for_inference
from apps.LT2.mixers.dsa import DSAArgs
from apps.LT2.mixers.nsa import NSAArgs
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs

VOCAB, DIM, HEADS, LAYERS, FFN = 50, 32, 2, 5, 96
PATTERNS = ["gdn", "full", "4:1", "7->full,gdn*4->3"]
LOOPS = {pattern: pattern.count("->") + 1 if "->" in pattern else 4 for pattern in PATTERNS}


def make(**changes) -> LoopedTransformer:
    torch.manual_seed(0)
    args = {"dim": DIM, "n_heads": HEADS, "n_layers": LAYERS, "multiple_of": 32, "mixer": "gdn"}
    model = LoopedTransformer(LoopedTransformerArgs(**{**args, "vocab_size": VOCAB, **changes}))
    model.init_weights()
    return model


def mixing_flops(model: LoopedTransformer, seqlen: int) -> int:
    """FLOPs besides projections, over a sequence and all (loop, layer)."""
    total = 0
    for spec in (spec for loop in model.layout for spec in loop):
        if spec.mixer == "gdn":
            key, value = 3 * DIM // (4 * HEADS), 6 * DIM // (4 * HEADS)
            convolutions = 2 * 4 * HEADS * (2 * key + value)
            total += seqlen * (convolutions + 7 * HEADS * key * value)
        else:
            pairs = sum(min(t + 1, spec.window or seqlen) for t in range(seqlen))
            total += 4 * DIM * pairs
    return total


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("weight_tying", [False, True])
def test_forward_flops_equal_the_products_that_run(pattern, weight_tying):
    seqlen = 12
    model = make(attention_pattern=pattern, loop_count=LOOPS[pattern], weight_tying=weight_tying)
    products = []

    def watch(linear: nn.Linear, _, out: torch.Tensor) -> None:
        products.append(2 * linear.in_features * out.numel())

    for block in model.layers:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(watch)
    model(torch.randint(VOCAB, (1, seqlen)))
    head = 2 * DIM * VOCAB * seqlen
    want = (sum(products) + head + mixing_flops(model, seqlen)) / seqlen
    got = forward_flops_per_token(model, seqlen)
    # Every (loop, layer) rounds its mean over the sequence to a whole number.
    assert got == pytest.approx(want, abs=LAYERS * LOOPS[pattern])
    assert train_flops_per_token(model, seqlen) == 3 * got


def test_loops_multiply_flops_but_not_parameters():
    once, thrice = make(loop_count=1), make(loop_count=3)
    head = 2 * DIM * VOCAB
    body = forward_flops_per_token(once, 100) - head
    assert forward_flops_per_token(thrice, 100) - head == 3 * body
    assert count_parameters(once).body == count_parameters(thrice).body


def test_linear_mixers_cost_the_same_at_any_length():
    model = make(mixer="gdn")
    assert forward_flops_per_token(model, 100) == forward_flops_per_token(model, 10_000)
    windowed = make(mixer="window", default_sliding_window=16)
    long, longer = (forward_flops_per_token(windowed, n) for n in (10_000, 20_000))
    assert long == pytest.approx(longer, rel=1e-3)


@pytest.mark.parametrize("weight_tying", [False, True])
@pytest.mark.parametrize("use_residual", [False, True])
def test_parameters_of_a_llama_block(weight_tying, use_residual):
    model = make(
        mixer="full",
        n_kv_heads=1,
        loop_count=4,
        weight_tying=weight_tying,
        use_residual=use_residual,
        gated_attn=True,
    )
    attention = 3 * DIM * DIM + 2 * DIM * (DIM // HEADS)  # wq, wo, wg; wk, wv of one head
    count = count_parameters(model)
    assert count.body == LAYERS * (attention + 3 * DIM * FFN + 2 * DIM) + DIM
    assert count.embedding == VOCAB * DIM * (1 if weight_tying else 2)
    assert count.gates == (4 * DIM if use_residual else 0)
    assert count.total == sum(p.numel() for p in model.parameters())


def test_gdn_parameters_are_about_six_dim_squared():
    """The budget of https://arxiv.org/abs/2412.06464: q, k 0.75 each, v, gate and output 1.5."""
    model = make(mixer="gdn", n_layers=1)
    matrices = 6 * DIM * DIM + 2 * DIM * HEADS  # and wa, wb
    vectors = 2 * HEADS + 4 * 3 * DIM + 1.5 * DIM / HEADS  # A_log, dt_bias; convolutions; norm
    assert sum(p.numel() for p in model.layers[0].gdn.parameters()) == matrices + vectors


def test_a_layer_of_two_families_counts_both():
    both = make(attention_pattern="gdn->full", loop_count=2)
    gdn, full = make(mixer="gdn", loop_count=2), make(mixer="full", loop_count=2)
    mixers = [
        sum(p.numel() for block in m.layers for mixer in block.mixers() for p in mixer.parameters())
        for m in (both, gdn, full)
    ]
    assert mixers[0] == mixers[1] + mixers[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cache_bytes(pattern, dtype):
    model, seqlen = make(attention_pattern=pattern, loop_count=LOOPS[pattern]), 20
    key, value = 12, 24
    want = 0
    for spec in (spec for loop in model.layout for spec in loop):
        if spec.mixer == "gdn":  # the state is always fp32
            want += 4 * HEADS * key * value + 3 * HEADS * (2 * key + value) * dtype.itemsize
        else:
            want += 2 * DIM * min(spec.window or seqlen, seqlen) * dtype.itemsize
    assert cache_bytes(model, seqlen, dtype) == want


# ---- bytes of a decode step

N_LOOPS = 4


def make_for_decoding(**changes) -> LoopedTransformer:
    args = {"dim": DIM, "n_heads": HEADS, "n_layers": LAYERS, "multiple_of": 32, "mixer": "gdn"}
    args |= {"vocab_size": VOCAB, "loop_count": N_LOOPS, **changes}
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
GDN_CACHE = 4 * HEADS * KEY * VALUE + 2 * 3 * HEADS * (2 * KEY + VALUE)  # fp32 state; conv state


@pytest.mark.parametrize("weight_tying", [False, True])
def test_step_traffic_of_a_hybrid(weight_tying):
    model = make_for_decoding(attention_pattern="4:1", weight_tying=weight_tying)
    batch_size, seqlen = 3, 100
    got = step_traffic(model, batch_size, seqlen, torch.bfloat16)
    stack = LAYERS * FEED_FORWARD + 4 * GDN + ATTENTION
    assert got.weights == N_LOOPS * stack + 4 * N_LOOPS * DIM  # and rho
    assert got.head == 2 * VOCAB * DIM + 4 * DIM + 2 * batch_size * DIM
    keys_and_values = 2 * 2 * DIM * seqlen
    assert got.caches == batch_size * N_LOOPS * (4 * 2 * GDN_CACHE + keys_and_values)
    assert got.total == got.weights + got.head + got.caches


@pytest.mark.parametrize("seqlen, seen", [(5, 5), (7, 7), (100, 7)])
def test_a_window_reads_only_visible_keys(seqlen, seen):
    model = make_for_decoding(mixer="window", default_sliding_window=7)
    got = step_traffic(model, 1, seqlen, torch.bfloat16)
    assert got.caches == N_LOOPS * LAYERS * 2 * 2 * DIM * seen


@pytest.mark.parametrize("seqlen, attended", [(5, 5), (40, 16)])
def test_dsa_reads_all_index_keys_and_the_keys_they_pick(seqlen, attended):
    model = make_for_decoding(mixer="dsa", dsa=DSAArgs(top_k=16, n_index_heads=1, index_head_dim=8))
    got = step_traffic(model, 2, seqlen, torch.bfloat16)
    assert got.caches == 2 * N_LOOPS * LAYERS * 2 * (8 * seqlen + 2 * DIM * attended)


# means of complete blocks, chosen keys, keys of the window
@pytest.mark.parametrize("seqlen, read", [(5, 1 + 5 + 5), (9, 2 + 9 + 6), (40, 10 + 12 + 6)])
def test_nsa_reads_means_chosen_blocks_and_a_window(seqlen, read):
    nsa = NSAArgs(block_size=4, n_blocks=3, window_size=6)
    model = make_for_decoding(mixer="nsa", n_heads=16, nsa=nsa)  # one key/value head of dim 2
    got = step_traffic(model, 2, seqlen, torch.bfloat16)
    assert got.caches == 2 * N_LOOPS * LAYERS * 2 * 2 * 2 * read


def test_a_loop_reads_only_the_mixer_that_it_runs():
    model = make_for_decoding(attention_pattern="gdn->full->full->full", use_residual=False)
    got = step_traffic(model, 1, 1, torch.bfloat16).weights
    assert got == LAYERS * (N_LOOPS * FEED_FORWARD + GDN + 3 * ATTENTION)


def test_weights_are_read_once_per_loop_and_batch():
    once, thrice = (
        make_for_decoding(loop_count=1, use_residual=False),
        make_for_decoding(loop_count=3, use_residual=False),
    )
    small, large = (step_traffic(once, b, 64, torch.float32) for b in (1, 8))
    assert step_traffic(thrice, 1, 64, torch.float32).weights == 3 * small.weights
    assert large.weights == small.weights
    assert large.caches == 8 * small.caches
