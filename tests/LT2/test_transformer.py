"""The looped model: what a loop computes, exact cached decoding, documents, loss and init.

Shapes: B sequences, T tokens, D model width. Gates that start at zero are moved off it, or they
would hide the loops.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.LT2 import transformer
from apps.LT2.flops import cache_bytes
from apps.LT2.kernel import linear_cross_entropy
from apps.LT2.parallel import get_no_recompute_ops, set_activation_checkpointing
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs, fit_loop_gates
from lingua.args import UserError
from lingua.parallelize import apply_activation_checkpointing
from tests.LT2.tiny import DSA, make_choices_clear
from tests.tolerances import FP32_MODEL, assert_same

VOCAB = 40
SMALL = {"dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 32, "vocab_size": VOCAB}

# Any number of loops.
ONE_SEGMENT = {
    "full": {"mixer": "full"},
    "full_gqa_gated": {"mixer": "full", "n_kv_heads": 1, "gated_attn": True},
    "full_no_gate_tied": {"mixer": "full", "use_residual": False, "weight_tying": True},
    "window_4": {"mixer": "window", "default_sliding_window": 4},
    "gdn": {"mixer": "gdn"},
    "gdn_full_4to1": {"mixer": "gdn", "attention_pattern": "4:1", "n_layers": 5},
    "full_gdn_bookend": {
        "mixer": "gdn",
        "hybrid_mixer": "full",
        "attention_pattern": "bookend:1",
        "n_layers": 3,
    },
    "dsa": {"mixer": "dsa", "dsa": DSA},
    "gdn_dsa_1to1": {
        "mixer": "gdn",
        "hybrid_mixer": "dsa",
        "attention_pattern": "1:1",
        "dsa": DSA,
    },
}
# A segment a loop.
PER_LOOP = {
    "window_to_window_to_full": {"attention_pattern": "3->6->full", "loop_count": 3},
    "gdn_then_full": {"attention_pattern": "gdn->full", "loop_count": 2},
    "families_swap": {"attention_pattern": "gdn,full->5,gdn", "loop_count": 2},
    "random": {
        "mixer": "window",
        "attention_pattern": "random:2:1",
        "default_sliding_window": 4,
        "n_layers": 3,
        "loop_count": 2,
    },
}
MODELS = {
    f"{name}_T{T}": {**changes, "loop_count": T}
    for name, changes in ONE_SEGMENT.items()
    for T in (1, 2, 4)
} | PER_LOOP


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request) -> LoopedTransformer:
    return make(**request.param)


def make(*, jitter: float = 0.02, **changes) -> LoopedTransformer:
    torch.manual_seed(0)
    model = LoopedTransformer(LoopedTransformerArgs(**{**SMALL, **changes}))
    model.init_weights()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += jitter * torch.randn_like(p)
            if name.endswith("A_log") and jitter:
                p[0] = -1.0  # a head that remembers hundreds of tokens: what leaks is seen
        if model.rho is not None and jitter:
            model.rho += 0.5
    make_choices_clear(model)
    return model


def prompt(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0] + [len(d) for d in documents])
    return torch.cat(documents)[None], lengths.cumsum(0).int()


def decode(model: LoopedTransformer, cache, tokens: Tensor) -> Tensor:
    return torch.cat([model.step(t, cache) for t in tokens.split(1, 1)], 1)


def assert_same_fp32(got: Tensor, want: Tensor) -> None:
    assert_same(got, want, FP32_MODEL)


# ------------------------------------------------------------------------------------ the loop


def test_looping_is_a_deeper_model_with_the_same_layers_again():
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
    """The loop of the docstring, written out over the model's own layers."""
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
    """Each mixer runs as often as the layout says, and each gate row is used."""
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


def test_logits_are_fp32_whatever_the_weights(model):
    assert model.bfloat16()(prompt(1, 5)).dtype == torch.float32


# ---------------------------------------------------------------------------------- decoding


def test_cached_decode_equals_full_forward(model):
    tokens = prompt(2, 14)
    want = model(tokens)
    cache = model.init_cache(2, 14)
    got = [model.prefill(tokens[:, :5], cache), decode(model, cache, tokens[:, 5:])]
    assert_same_fp32(torch.cat(got, 1), want)
    assert cache.lengths == [14, 14]


@pytest.mark.parametrize("window", range(1, 8))
@pytest.mark.parametrize("loop_count", [1, 2, 4])
def test_every_window_width_decodes_exactly(window, loop_count):
    tokens = prompt(2, 6)
    model = make(mixer="window", default_sliding_window=window, loop_count=loop_count)
    want = model(tokens)
    for n_prompt in range(1, 7):
        cache = model.init_cache(2, 6)
        got = [model.prefill(tokens[:, :n_prompt], cache)]
        got += [decode(model, cache, tokens[:, n_prompt:])] if n_prompt < 6 else []
        assert_same_fp32(torch.cat(got, 1), want)


def test_a_window_wider_than_the_sequence_is_full_attention():
    tokens = prompt(2, 6)
    full = make(mixer="full")
    assert_same_fp32(make(mixer="window", default_sliding_window=6)(tokens), full(tokens))
    narrower = make(mixer="window", default_sliding_window=5)(tokens)
    assert_same_fp32(narrower[:, :5], full(tokens)[:, :5])
    assert not torch.allclose(narrower[:, 5], full(tokens)[:, 5])


def test_split_prompt_decodes_exactly(model):
    tokens = prompt(2, 12)
    want = model(tokens)
    cache = model.init_cache(2, 12)
    pieces = [model.prefill(piece, cache) for piece in tokens[:, :9].split([4, 1, 4], 1)]
    assert_same_fp32(torch.cat([*pieces, decode(model, cache, tokens[:, 9:])], 1), want)


def test_packed_prompts_of_different_lengths_decode_exactly(model):
    streams = [prompt(1, n + 4)[0] for n in (7, 1, 12)]
    want = [model(s[None])[0] for s in streams]
    tokens, cu_seqlens = packed([s[:-4] for s in streams])
    cache = model.init_cache(3, 16)
    got = model.prefill(tokens, cache, cu_seqlens=cu_seqlens)
    assert_same_fp32(got[0], torch.cat([w[:-4] for w in want]))
    got = decode(model, cache, torch.stack([s[-4:] for s in streams]))
    assert_same_fp32(got, torch.stack([w[-4:] for w in want]))
    assert cache.lengths == [11, 5, 16]


def test_last_only_gives_each_sequences_last_logits(model):
    streams = [prompt(1, n)[0] for n in (7, 1, 12)]
    want = torch.stack([model(s[None])[0, -1:] for s in streams])
    tokens, cu_seqlens = packed(streams)
    cache = model.init_cache(3, 12)
    got = model.prefill(tokens, cache, cu_seqlens=cu_seqlens, last_only=True)
    assert_same_fp32(got, want)
    cache = model.init_cache(2, 12)
    tokens = prompt(2, 7)
    assert_same_fp32(model.prefill(tokens, cache, last_only=True), model(tokens)[:, -1:])


def test_an_empty_document_has_no_last_logits():
    """They would be those of the document before it."""
    model = make()
    cache, bounds = model.init_cache(3, 8), torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    with pytest.raises(AssertionError, match=r"no last position in sequences of \[3, 0, 2\]"):
        model.prefill(prompt(1, 5), cache, cu_seqlens=bounds, last_only=True)
    assert cache.lengths == [0, 0, 0]


def test_a_finished_row_is_refilled_while_the_others_go_on(model):
    streams, refill = prompt(3, 12), prompt(1, 15)[:, :9]
    want, want_refill = model(streams), model(refill)
    cache = model.init_cache(3, 12)
    model.prefill(streams[:, :5], cache)
    cache.reset([1])
    got = model.prefill(refill[:, :3], cache, rows=torch.tensor([1]))
    assert_same_fp32(got, want_refill[:, :3])
    inputs = streams[:, 5:11].clone()
    inputs[1] = refill[0, 3:]
    got = decode(model, cache, inputs)
    assert_same_fp32(got[[0, 2]], want[[0, 2], 5:11])
    assert_same_fp32(got[1], want_refill[0, 3:])
    assert cache.lengths == [11, 9, 11]
    cache.reset()
    assert cache.lengths == [0, 0, 0]
    assert_same_fp32(model.prefill(streams, cache), want)


def test_one_cache_for_every_loop_and_layer(model):
    cache = model.init_cache(3, 10)
    assert [len(loop) for loop in cache.mixers] == [model.args.n_layers] * model.args.loop_count
    tensors = [t for loop in cache.mixers for mixer in loop for t in mixer._tensors() if t.numel()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    counters = sum(t.nbytes for t in tensors if not t.is_floating_point())
    assert cache.nbytes() - counters == 3 * cache_bytes(model, 10, torch.float32)


def test_decoding_keeps_no_graph(model):
    """A cache that took part in a graph would hold every step since the prompt."""
    cache = model.init_cache(1, 4)
    logits = [model.prefill(prompt(1, 3), cache), model.step(prompt(1, 1), cache)]
    tensors = [t for loop in cache.mixers for mixer in loop for t in mixer._tensors()]
    assert not any(t.requires_grad for t in (*logits, *tensors))


def test_a_full_cache_is_refused_before_anything_is_written():
    model = make()
    cache = model.init_cache(2, 4)
    model.prefill(prompt(2, 3), cache)
    with pytest.raises(UserError, match="3 cached [+] 2 new tokens exceed .* max_seqlen=4"):
        model.prefill(prompt(2, 2), cache)
    model.step(prompt(2, 1), cache)
    with pytest.raises(UserError, match="max_seqlen=4"):
        model.step(prompt(2, 1), cache)
    assert cache.lengths == [4, 4]


# ------------------------------------------------------------------------------ random layouts


def test_a_random_layout_is_redrawn_each_step_and_runs():
    """At each step the model computes what one with that layout written out does."""
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


def test_a_random_layout_is_fixed_outside_of_training():
    model, tokens = make(**MODELS["random"]), prompt(1, 12)
    layout, want = model.layout, model(tokens)
    assert layout == model.args.layout()
    model.begin_step(1)
    assert model.layout != layout and not torch.equal(model(tokens), want)
    cache = model.init_cache(1, 12)  # decoding in the midst of training, say of samples
    got = [model.prefill(tokens[:, :5], cache), decode(model, cache, tokens[:, 5:])]
    assert_same_fp32(torch.cat(got, 1), want)
    model.begin_step(None)
    assert model.layout == layout and torch.equal(model(tokens), want)


def test_a_random_layout_compiles_a_block_twice_at_most():
    """Only the LayerSpec changes from step to step: full, or the window."""
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
    """Of all weights; `want` need not reach those that a mixer trains by a loss of its own."""
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


def test_loss_and_gradients_are_those_of_cross_entropy(model, monkeypatch):
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
    assert len(runs) == 6, "loops are run again in the backward"


def test_the_more_is_computed_again_the_less_is_kept_for_the_backward():
    kept = {}
    for mode in ("none", "selective", "full", "loop"):
        model = make(loop_count=4)
        set_activation_checkpointing(model, mode)
        for block in model.layers:
            apply_activation_checkpointing(block, mode, get_no_recompute_ops())
        tokens, targets = prompt(2, 63), prompt(2, 64)[:, 1:]
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = model(tokens, target=targets)
        kept[mode] = sum(event.self_cpu_memory_usage for event in profile.key_averages())
        del loss
    assert kept["none"] > 1.2 * kept["selective"] > 1.2 * kept["full"] > 0, kept
    assert kept["full"] > 1.1 * kept["loop"] > 0, kept


# --------------------------------------------------------------------------------------- init


@pytest.mark.parametrize("name", MODELS)
def test_init_weights_fills_every_tensor(name):
    with torch.device("meta"):
        model = LoopedTransformer(LoopedTransformerArgs(**{**SMALL, **MODELS[name]}))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights()
    for key, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), key


def spread(tensor: Tensor) -> float:
    """Standard deviation of the normal that was cut at three of them."""
    return tensor.std().item() / 0.9866


def close(std: float):
    return pytest.approx(std, rel=0.1)


def test_spread_is_one_over_root_fan_in():
    model = make(jitter=0, mixer="gdn", attention_pattern="1:1")
    gdn, attention = model.layers[0].gdn, model.layers[1].attention
    for linear in (gdn.wq, gdn.wv, gdn.wg, gdn.wo, attention.wq, attention.wo, model.output):
        assert spread(linear.weight) == close(linear.in_features**-0.5)
    assert spread(model.tok_embeddings.weight) == close(32**-0.5)


def test_output_projections_start_alike_beside_every_mixer():
    """A wider FFN output beside one family would confound a comparison of families."""
    model = make(
        jitter=0, mixer="gdn", attention_pattern="1:1", init_std_factor="global_depth", loop_count=4
    )
    factor = (2 * 2 * 4) ** 0.5  # effective depth: 2 layers, 4 loops
    for block in model.layers:
        ffn = block.feed_forward
        assert spread(ffn.w2.weight) == close(ffn.hidden_dim**-0.5 / factor)
        assert spread(ffn.w1.weight) == close(32**-0.5)
        assert spread(ffn.w3.weight) == close(32**-0.5)
        (mixer,) = block.mixers()
        assert spread(mixer.wo.weight) == close(mixer.wo.in_features**-0.5 / factor)


def test_current_depth_charges_the_deepest_use_of_a_layer():
    model = make(jitter=0, n_layers=2, loop_count=3, init_std_factor="current_depth")
    for layer, depth in ((0, 5), (1, 6)):
        wo = model.layers[layer].attention.wo
        assert spread(wo.weight) == close(32**-0.5 / (2 * depth) ** 0.5)


@pytest.mark.parametrize("mixer", ["full", "gdn"])
def test_init_base_std_reaches_every_matrix(mixer):
    model = make(jitter=0, mixer=mixer, init_base_std=0.5)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            bound = 4 / (2 * module.weight.numel()) ** 0.5
            assert spread(module.weight) == pytest.approx(0.5, rel=bound)


def test_tied_head_is_the_embedding():
    model = make(jitter=0, weight_tying=True, loop_count=2)
    assert "output.weight" not in model.state_dict()
    assert model.head_weight is model.tok_embeddings.weight
    tokens = prompt(1, 4)
    logits = model(tokens)
    with torch.no_grad():
        model.tok_embeddings.weight[VOCAB - 1] *= 3  # not in the prompt
        assert VOCAB - 1 not in tokens
    assert_same_fp32(model(tokens)[..., -1], 3 * logits[..., -1])


def test_gates_start_closed():
    """At the start a gated model computes what a model without gates does."""
    gated, plain = make(jitter=0, loop_count=3), make(jitter=0, loop_count=3, use_residual=False)
    assert gated.rho.shape == (3, 32) and not gated.rho.any()
    assert plain.rho is None and "rho" not in plain.state_dict()
    assert torch.equal(gated(prompt(1, 5)), plain(prompt(1, 5)))


def test_gates_for_another_loop_count(caplog):
    rho = torch.randn(2, 8)
    assert fit_loop_gates(rho, 2) is rho
    assert not caplog.records
    assert torch.equal(fit_loop_gates(rho, 4), rho[[0, 1, 1, 1]])
    assert torch.equal(fit_loop_gates(rho, 1), rho[:1])
    assert [r.name for r in caplog.records] == [transformer.__name__] * 2  # said, not silent


def test_same_seed_same_weights():
    first, second = make(mixer="gdn").state_dict(), make(mixer="gdn").state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


# ------------------------------------------------------------------------------------ settings


def test_sliding_window_narrows_full_layers_only():
    model = make(sliding_window=3, mixer="gdn", attention_pattern="full,gdn,5", n_layers=3)
    assert [str(spec) for spec in model.layout[0]] == ["window=3", "gdn", "window=5"]


def test_families_of_different_loops_have_their_own_weights():
    model = make(attention_pattern="gdn->full->8", loop_count=3)
    for block in model.layers:
        assert [mixer.module_name for mixer in block.mixers()] == ["gdn", "attention"]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"vocab_size": -1}, "model.vocab_size=-1"),
        ({"dim": 0}, "model.dim=0"),
        ({"n_heads": None}, "model.n_heads and model.head_dim are both null"),
        ({"n_heads": 5}, "model.n_heads=5 does not divide model.dim=32"),
        ({"n_heads": 0}, "model.n_heads=0"),
        ({"n_heads": None, "head_dim": 5}, "model.head_dim=5 does not divide model.dim=32"),
        ({"head_dim": 0}, "model.head_dim=0"),
        ({"head_dim": 7}, "model.head_dim=7 .* is odd"),
        ({"n_heads": 32}, "model.head_dim=1 .* is odd"),
        ({"n_kv_heads": 3}, "model.n_kv_heads=3 does not divide the 2 query heads"),
        ({"n_kv_heads": 0}, "model.n_kv_heads=0"),
        ({"n_kv_heads": -1}, "model.n_kv_heads=-1"),
        ({"multiple_of": 0}, "model.multiple_of=0"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
        ({"rope_theta": -1.0}, "model.rope_theta=-1.0"),
        ({"init_base_std": 0.0}, "model.init_base_std=0.0 must be above 0"),
        ({"init_std_factor": "deep"}, "model.init_std_factor='deep' is none of disabled"),
        ({"ffn_dim_multiplier": -1.0}, "model.ffn_dim_multiplier=-1.0"),
        ({"ffn_dim_multiplier": 0.001}, "model.ffn_dim_multiplier=0.001 leaves .* no channel"),
        ({"sliding_window": 0}, "model.sliding_window=0"),
        ({"attn_impl": "flash"}, "model.attn_impl='flash'"),
        ({"attn_impl": "sdpa", "mixer": "window"}, "model.attn_impl=sdpa has no sliding window"),
        ({"attn_impl": "sdpa", "sliding_window": 4}, "model.attn_impl=sdpa has no sliding window"),
        ({"attention_pattern": "3->full", "loop_count": 3}, "2 segments for model.loop_count=3"),
        ({"mixer": "gdn", "n_heads": None, "head_dim": 16}, "model.gdn.n_heads"),
        ({"mixer": "gdn", "n_heads": 5}, "model.gdn.head_dim"),
        ({"mixer": "gdn", "n_heads": 0}, "model.n_heads=0"),
    ],
)
def test_impossible_models_are_refused_by_name(changes, told):
    with pytest.raises(UserError, match=told):
        LoopedTransformer(LoopedTransformerArgs(**{**SMALL, **changes}))


@pytest.mark.parametrize("mixer", ["gdn", "kda", "deltanet"])
@pytest.mark.parametrize(
    "changes, told",
    [
        ({"conv_size": 1}, "conv_size=1"),
        ({"conv_size": 9}, "conv_size=9"),
        ({"conv_size": -1}, "conv_size=-1"),
        ({"expand_v": 1.3}, "expand_v=1.3"),
        ({"expand_v": -2.0}, "expand_v=-2.0"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"n_heads": 5}, "head_dim"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"head_dim": -8}, "head_dim=-8"),
    ],
)
def test_impossible_settings_of_delta_rules_are_refused_by_name(mixer, changes, told):
    args = LoopedTransformerArgs(**SMALL, mixer=mixer)
    for field, value in changes.items():
        setattr(getattr(args, mixer), field, value)
    with pytest.raises(UserError, match=f"model.{mixer}.{told}"):
        LoopedTransformer(args)
