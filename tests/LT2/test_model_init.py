"""Initial weights of a looped model, and settings that are user errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from apps.LT2.mixers import MIXERS
from apps.LT2.transformer import (
    LoopedTransformer,
    LoopedTransformerArgs,
    build_on_meta,
    fit_loop_gates,
)
from lingua.errors import UserError
from tests.LT2.looped_models import MODELS, SMALL, VOCAB, assert_same_fp32, make, prompt


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


def std_of(tensor: Tensor) -> float:
    """Return the std of the normal distribution before it was cut at three of them."""
    return tensor.std().item() / 0.9866


def close(std: float):
    return pytest.approx(std, rel=0.1)


def test_std_is_one_over_root_fan_in():
    model = make(jitter=0, mixer="gdn", attention_pattern="1:1")
    gdn, attention = model.layers[0].gdn, model.layers[1].attention
    for linear in (gdn.wq, gdn.wv, gdn.wg, gdn.wo, attention.wq, attention.wo, model.output):
        assert std_of(linear.weight) == close(linear.in_features**-0.5)
    assert std_of(model.tok_embeddings.weight) == close(32**-0.5)


def test_output_projections_have_the_same_std_with_every_mixer():
    """A larger FFN output with one family would confound a comparison of families."""
    model = make(
        jitter=0, mixer="gdn", attention_pattern="1:1", init_std_factor="global_depth", loop_count=4
    )
    factor = (2 * 2 * 4) ** 0.5  # effective depth: 2 layers, 4 loops
    for block in model.layers:
        ffn = block.feed_forward
        assert std_of(ffn.w2.weight) == close(ffn.hidden_dim**-0.5 / factor)
        assert std_of(ffn.w1.weight) == close(32**-0.5)
        assert std_of(ffn.w3.weight) == close(32**-0.5)
        (mixer,) = block.mixers()
        assert std_of(mixer.wo.weight) == close(mixer.wo.in_features**-0.5 / factor)


def test_current_depth_is_the_depth_in_the_last_loop():
    model = make(jitter=0, n_layers=2, loop_count=3, init_std_factor="current_depth")
    for layer, depth in ((0, 5), (1, 6)):
        wo = model.layers[layer].attention.wo
        assert std_of(wo.weight) == close(32**-0.5 / (2 * depth) ** 0.5)


@pytest.mark.parametrize("mixer", ["full", "gdn"])
def test_init_base_std_reaches_every_matrix(mixer):
    model = make(jitter=0, mixer=mixer, init_base_std=0.5)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            bound = 4 / (2 * module.weight.numel()) ** 0.5
            assert std_of(module.weight) == pytest.approx(0.5, rel=bound)


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


def test_residual_gates_start_at_zero():
    """At the start a model with gates equals one without."""
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
    assert len(caplog.records) == 2  # logged, not silent


def test_same_seed_same_weights():
    first, second = make(mixer="gdn").state_dict(), make(mixer="gdn").state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_sliding_window_narrows_full_layers_only():
    model = make(sliding_window=3, mixer="gdn", attention_pattern="full,gdn,5", n_layers=3)
    assert [str(spec) for spec in model.layout[0]] == ["window=3", "gdn", "window=5"]


def test_families_of_different_loops_have_their_own_weights():
    model = make(attention_pattern="gdn->full->8", loop_count=3)
    for block in model.layers:
        assert [mixer.module_name for mixer in block.mixers()] == ["gdn", "attention"]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"vocab_size": -1}, "model.vocab_size=-1"),
        ({"dim": 0}, "model.dim=0"),
        ({"n_heads": 5}, r"model\.n_heads=5"),
        ({"n_heads": 0}, "model.n_heads=0"),
        ({"n_heads": None, "head_dim": 5}, r"model\.head_dim=5"),
        ({"head_dim": 0}, "model.head_dim=0"),
        ({"head_dim": 7}, r"model\.head_dim=7"),
        ({"n_heads": 32}, r"model\.head_dim=1"),
        ({"n_kv_heads": 3}, r"model\.n_kv_heads=3"),
        ({"n_kv_heads": 0}, "model.n_kv_heads=0"),
        ({"n_kv_heads": -1}, "model.n_kv_heads=-1"),
        ({"multiple_of": 0}, "model.multiple_of=0"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
        ({"mixer_norm_eps": 0.0}, "model.mixer_norm_eps=0.0"),
        ({"rope_theta": -1.0}, "model.rope_theta=-1.0"),
        ({"init_base_std": 0.0}, r"model\.init_base_std=0\.0"),
        ({"init_std_factor": "deep"}, r"model\.init_std_factor='deep'"),
        ({"ffn_dim_multiplier": -1.0}, "model.ffn_dim_multiplier=-1.0"),
        ({"ffn_dim_multiplier": 0.001}, r"model\.ffn_dim_multiplier=0\.001"),
        ({"sliding_window": 0}, "model.sliding_window=0"),
        ({"attn_impl": "flash"}, "model.attn_impl='flash'"),
        ({"attn_impl": "sdpa", "mixer": "window"}, r"model\.attn_impl=sdpa"),
        ({"attn_impl": "sdpa", "sliding_window": 4}, r"model\.attn_impl=sdpa"),
        (
            {"attention_pattern": "3->full", "loop_count": 3},
            r"model\.loop_count=3",
        ),
        ({"mixer": "gdn", "n_heads": None, "head_dim": 5}, r"model\.head_dim=5"),
        ({"mixer": "gdn", "n_heads": 5}, "model.gdn.head_dim"),
        ({"mixer": "gdn", "n_heads": 0}, "model.n_heads=0"),
    ],
)
def test_wrong_models_are_user_errors(changes, match):
    with pytest.raises(UserError, match=match):
        LoopedTransformer(LoopedTransformerArgs(**{**SMALL, **changes}))


@pytest.mark.parametrize("mixer", [m for m in MIXERS if m not in ("mamba2", "nsa")])
@pytest.mark.parametrize("dim, head_dim, want", [(512, None, 4), (32, None, 1), (32, 16, 2)])
def test_all_mixers_have_the_same_default_heads(mixer, dim, head_dim, want):
    """dim / head_dim, or dim / 128."""
    changes = {"dim": dim, "n_heads": None, "head_dim": head_dim, "mixer": mixer}
    model = build_on_meta(LoopedTransformerArgs(**{**SMALL, **changes}))
    assert {mixer.n_heads for block in model.layers for mixer in block.mixers()} == {want}


@pytest.mark.parametrize("mixer", ["gdn", "kda", "deltanet"])
@pytest.mark.parametrize(
    "changes, match",
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
def test_wrong_settings_of_delta_rules_are_user_errors(mixer, changes, match):
    args = LoopedTransformerArgs(**SMALL, mixer=mixer)
    for field, value in changes.items():
        setattr(getattr(args, mixer), field, value)
    with pytest.raises(UserError, match=f"model.{mixer}.{match}"):
        LoopedTransformer(args)
