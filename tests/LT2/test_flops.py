"""Costs, counted a second way: by watching the model run, and from a closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apps.LT2.flops import (
    cache_bytes,
    count_parameters,
    forward_flops_per_token,
    train_flops_per_token,
)
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
    """What is not a projection, over a sequence and all (loop, layer)."""
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
def test_forward_flops_are_what_runs(pattern, weight_tying):
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


def test_flops_of_the_body_grow_with_the_loops_and_parameters_do_not():
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
def test_parameters_of_a_llama_block_counted_by_hand(weight_tying, use_residual):
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


def test_gdn_parameters_are_six_dim_squared_and_a_little():
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
def test_cache_bytes_by_hand(pattern, dtype):
    model, seqlen = make(attention_pattern=pattern, loop_count=LOOPS[pattern]), 20
    key, value = 12, 24
    want = 0
    for spec in (spec for loop in model.layout for spec in loop):
        if spec.mixer == "gdn":  # the state is fp32 in any model
            want += 4 * HEADS * key * value + 3 * HEADS * (2 * key + value) * dtype.itemsize
        else:
            want += 2 * DIM * min(spec.window or seqlen, seqlen) * dtype.itemsize
    assert cache_bytes(model, seqlen, dtype) == want
