"""The looped model: loops, random layouts, documents and the loss."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel import linear_cross_entropy
from apps.LT2.parallel import get_no_recompute_ops
from apps.LT2.transformer import LoopedTransformer
from lingua.parallel.parallelize import apply_activation_checkpointing
from tests.LT2.looped_models import MODELS, assert_same_fp32, decode, make, packed, prompt
from tests.LT2.tiny import DSA
from tests.tolerances import FP32_MODEL, assert_same

# ------------------------------------------------------------------------------------ the loop


def test_loops_equal_a_deeper_model_with_repeated_layers():
    looped = make(loop_count=3, use_residual=False)
    deep = make(loop_count=1, use_residual=False, n_layers=6)
    weights = looped.state_dict()
    for i in range(6):
        shared = {k: v for k, v in weights.items() if k.startswith(f"layers.{i % 2}.")}
        weights |= {k.replace(f"layers.{i % 2}.", f"layers.{i}.", 1): v for k, v in shared.items()}
    deep.load_state_dict(weights)
    tokens = prompt(2, 9)
    assert torch.equal(looped(tokens), deep(tokens))


def test_residual_gate_adds_the_loops_input():
    """The loop of the module's docstring, over the model's layers."""
    model = make(mixer="gdn", attention_pattern="1:1", loop_count=3)
    tokens = prompt(2, 9)
    h = model.tok_embeddings(tokens)
    for t in range(3):
        u = h
        for block, spec in zip(model.layers, model.layout[t], strict=True):
            h = h + block.mixer(spec)(block.attention_norm(h))
            h = h + block.feed_forward(block.ffn_norm(h))
        h = h + model.rho[t] * u
    assert_same_fp32(model(tokens), model.norm(h) @ model.output.weight.T)


def test_every_loop_and_layer_matters(model):
    """Each mixer runs as often as in the layout, and each gate row is used."""
    calls = []
    for i, block in enumerate(model.layers):
        for mixer in block.mixers():
            mixer.register_forward_hook(lambda m, *_, i=i: calls.append((i, m)))
    model(prompt(1, 3))
    assert calls == [
        (i, block.mixer(spec))
        for loop in model.layout
        for i, (block, spec) in enumerate(zip(model.layers, loop, strict=True))
    ]


def test_the_model_is_causal(model):
    h = []
    hook = model.tok_embeddings.register_forward_hook(lambda m, i, out: h.append(out))
    logits = model(prompt(1, 12))
    hook.remove()
    for t in (0, 5, 10):
        (grad,) = torch.autograd.grad(logits[0, t].square().sum(), h[0], retain_graph=True)
        assert not grad[0, t + 1 :].any()
        assert grad[0, t].any()


def test_logits_are_fp32_for_any_weights(model):
    assert model.bfloat16()(prompt(1, 5)).dtype == torch.float32


# ------------------------------------------------------------------------------ random layouts


def test_a_random_layout_is_drawn_for_each_step():
    """At each step the model equals one with that layout as a list."""
    model, tokens = make(**MODELS["random"]), prompt(1, 12)
    layouts = set()
    for step in range(6):
        model.begin_step(step)
        layouts.add(model.layout)
        written = "->".join(",".join(s.mixer for s in loop) for loop in model.layout)
        fixed = make(**{**MODELS["random"], "attention_pattern": written})
        fixed.load_state_dict(model.state_dict())
        assert torch.equal(model(tokens), fixed(tokens))
    assert len(layouts) > 3
    assert {len(list(block.mixers())) for block in model.layers} == {1}


def test_a_random_layout_is_fixed_outside_training():
    model, tokens = make(**MODELS["random"]), prompt(1, 12)
    layout, want = model.layout, model(tokens)
    assert layout == model.args.layout()
    model.begin_step(1)
    assert model.layout != layout and not torch.equal(model(tokens), want)
    cache = model.init_cache(1, 12)  # decoding during training
    got = [model.prefill(tokens[:, :5], cache), decode(model, cache, tokens[:, 5:])]
    assert_same_fp32(torch.cat(got, 1), want)
    model.begin_step(None)
    assert model.layout == layout and torch.equal(model(tokens), want)


def test_a_random_layout_compiles_a_block_at_most_twice():
    """Only the LayerSpec changes from step to step: full or window."""
    from torch._dynamo.testing import CompileCounter  # slow to import

    model = make(**MODELS["random"], attn_impl="naive")
    counters = []
    for block in model.layers:
        counters.append(CompileCounter())
        block.forward = torch.compile(block.forward, backend=counters[-1], fullgraph=True)
    for step in range(5):
        model.begin_step(step)
        model(prompt(1, 12), target=prompt(1, 12)).backward()
    assert [counter.frame_count for counter in counters] == [2, 2, 2]


# ---------------------------------------------------------------------------------- documents


def test_packed_documents_equal_separate_ones(model):
    documents = [prompt(1, n)[0] for n in (6, 1, 9, 1, 3)]
    tokens, cu_seqlens = packed(documents)
    want = torch.cat([model(d[None])[0] for d in documents])
    assert_same_fp32(model(tokens, cu_seqlens=cu_seqlens)[0], want)


def test_packed_loss_and_gradients_equal_separate_ones(model):
    documents = [prompt(1, n)[0] for n in (6, 1, 9, 3)]
    tokens, cu_seqlens = packed(documents)
    targets = prompt(1, tokens.shape[1])
    loss = model(tokens, target=targets, cu_seqlens=cu_seqlens)
    logits = torch.cat([model(d[None])[0] for d in documents])
    assert_same_gradients(model, loss, F.cross_entropy(logits, targets[0]))


# --------------------------------------------------------------------------------------- loss


def assert_same_gradients(model: LoopedTransformer, loss: Tensor, want: Tensor) -> None:
    """Compare all gradients; `want` may lack those of weights that a mixer's own loss trains."""
    assert_same_fp32(loss, want)
    parameters = dict(model.named_parameters())
    apart = {p for weights in model.own_loss_parameters().values() for p in weights}
    got_grads = torch.autograd.grad(loss, parameters.values())
    want_grads = torch.autograd.grad(want, parameters.values(), allow_unused=True)
    for (name, p), g, w in zip(parameters.items(), got_grads, want_grads, strict=True):
        if w is None and p in apart:
            continue
        assert w is not None, name
        assert g.isfinite().all() and g.any(), f"{name} is not trained"
        assert_same(g, w, FP32_MODEL, name)


def test_loss_and_gradients_equal_cross_entropy(model, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_TOKENS", 8)
    tokens, targets = prompt(2, 15), prompt(2, 16)[:, 1:].clone()
    targets[0, :4] = targets[1, 9] = -100
    want = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert_same_gradients(model, model(tokens, target=targets), want)


@pytest.mark.parametrize("hybrid_mixer", ["full", "dsa"])
def test_checkpointing_whole_loops_changes_nothing(hybrid_mixer):
    changes = {"mixer": "gdn", "hybrid_mixer": hybrid_mixer, "attention_pattern": "1:1"}
    model = make(**changes, dsa=DSA, loop_count=3)
    tokens, targets = prompt(2, 9), prompt(2, 10)[:, 1:]
    plain = model(tokens, target=targets)
    runs = []
    model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    model.checkpoint_loops = True
    checkpointed = model(tokens, target=targets)
    assert len(runs) == 3
    assert_same_gradients(model, checkpointed, plain)
    assert len(runs) == 6, "the backward runs the loops again"


def test_more_recomputation_keeps_less_memory_for_the_backward():
    kept = {}
    for mode in ("none", "selective", "full", "loop"):
        model = make(loop_count=4)
        model.checkpoint_loops = mode == "loop"
        for block in model.layers:
            apply_activation_checkpointing(block, mode, get_no_recompute_ops())
        tokens, targets = prompt(2, 63), prompt(2, 64)[:, 1:]
        gc.collect()  # garbage of other tests would count as freed
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = model(tokens, target=targets)
        kept[mode] = sum(event.self_cpu_memory_usage for event in profile.key_averages())
        del loss
    assert kept["none"] > 1.2 * kept["selective"] > 1.2 * kept["full"] > 0, kept
    assert kept["full"] > 1.1 * kept["loop"] > 0, kept
