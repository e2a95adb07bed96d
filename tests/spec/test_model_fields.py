"""The fields of model: and the list of recipes in the specification."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

import pytest
import torch

from apps.LT2.mixers.attention import BIAS_NAMES
from apps.LT2.mixers.rotary import RopeScalingArgs
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.errors import UserError
from tests.LT2.golden import CONFIGS, RECIPES, read_recipe

MIXERS = ["full", "window", "gdn", "kda", "mamba2", "hgrn2", "deltanet", "retnet", "nsa", "dsa"]
NARROW = {"mixer": "window", "default_sliding_window": 4}
# (field, other options, value)
CHANGES: list[tuple[str, dict[str, Any], Any]] = [
    ("n_layers", {}, 4),
    ("loop_count", {}, 2),
    ("mixer", {}, "window"),
    *(("mixer", NARROW, mixer) for mixer in MIXERS if mixer != "window"),
    ("attention_pattern", {"mixer": "gdn"}, "4:1"),
    ("default_sliding_window", {"mixer": "window"}, 5),
    ("use_residual", {"loop_count": 2}, False),
    ("gated_attn", {}, True),
    # not in the specification
    ("attn_bias", {}, "qkv"),
    ("qk_norm", {}, True),
    ("rope_scaling", {}, RopeScalingArgs(rope_type="linear", factor=2.0)),
    ("dim", {}, 128),
    ("n_heads", {}, 8),
    ("head_dim", {}, 8),
    ("n_kv_heads", {}, 4),
    ("ffn_dim_multiplier", {}, 2.0),
    ("multiple_of", {}, 16),
    ("norm_eps", {}, 0.1),
    ("rope_theta", {}, 99.0),
    ("init_base_std", {}, 0.1),
    ("init_std_factor", {}, "global_depth"),
    ("vocab_size", {}, 60),
    ("weight_tying", {}, True),
    ("sliding_window", {}, 4),
    ("hybrid_mixer", {"mixer": "gdn", "attention_pattern": "4:1"}, "window"),
    ("mixer_norm_eps", {"mixer": "gdn"}, 0.1),
]
# Sections are options of mixers: tests/LT2/test_mixer_contract.py. A field outside the model:
ELSEWHERE = {
    "attn_impl",  # below
    "seed",  # of the trainer
    "max_seqlen",  # for warnings
    *("loop_schedule", "loop_sample", "loop_bptt"),  # of training: tests/LT2/test_loops.py
    *("loop_loss", "loop_loss_every", "loop_entropy"),  # of training: tests/LT2/test_loop_loss.py
}


def test_every_field_has_a_test():
    own = {name for name, value in vars(LoopedTransformerArgs()).items() if not is_dataclass(value)}
    assert own == {field for field, *_ in CHANGES} | ELSEWHERE


def tiny(**options: Any) -> LoopedTransformer:
    """Build a model with random gates."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"dim": 64, "n_layers": 5, "n_heads": 16, "vocab_size": 50}
    shape["default_sliding_window"] = 6
    model = LoopedTransformer(LoopedTransformerArgs(**shape | options))
    model.init_weights()
    for name, p in model.named_parameters():
        if name.endswith(("rho", "wg.weight", *BIAS_NAMES)):
            torch.nn.init.normal_(p, std=0.3)
    return model.requires_grad_(False)


TOKENS = torch.arange(12)[None]


@pytest.mark.parametrize("field, others, value", CHANGES)
def test_each_field_has_its_effect(field, others, value):
    before, after = tiny(**others), tiny(**others | {field: value})
    assert not torch.equal(before(TOKENS), after(TOKENS))
    layers = [[spec.mixer for spec in loop] for loop in after.layout]
    match field:
        case "n_layers":
            assert layers == [["full"] * 4] and len(after.layers) == 4
        case "loop_count":
            assert layers == [["full"] * 5] * 2 and len(after.layers) == 5
        case "mixer":
            assert layers == [[value] * 5]
        case "attention_pattern":
            assert layers == [["gdn"] * 4 + ["full"]]
        case "default_sliding_window":
            assert {spec.window for spec in after.layout[0]} == {5}
        case "use_residual":
            assert before.rho is not None and before.rho.shape == (2, 64) and after.rho is None
            before.init_weights()
            assert not before.rho.any()
        case "gated_attn":
            (attention,) = after.layers[0].mixers()
            assert attention.wg.weight.shape == (64, 64)


@pytest.mark.parametrize(
    "impl, function", [("fmha", "_fmha"), ("flex_attention", "_flex"), ("sdpa", "_sdpa")]
)
def test_attn_impl_reaches_attention(impl, function, monkeypatch):
    called = []

    def attend(q, *_):
        called.append(q.shape)
        return q

    monkeypatch.setattr(f"apps.LT2.kernel.attention.{function}", attend)
    tiny(attn_impl=impl)(TOKENS)
    assert len(called) == 5
    if impl == "sdpa":
        with pytest.raises(UserError, match=r"model\.attn_impl=sdpa"):
            tiny(attn_impl=impl, **NARROW)
    else:
        tiny(attn_impl=impl, **NARROW)(TOKENS)
        assert len(called) == 10


NAMED = [
    "600M/debug.yaml",
    *(f"{scale}/looped_pure_{mixer}_{scale}.yaml" for scale in ("600M", "1B") for mixer in MIXERS),
    "600M/looped_hybrid_gdn_4to1_600M.yaml",
    "600M/looped_hybrid_bookend_600M.yaml",
    "600M/looped_hybrid_128_256_512_full_600M.yaml",
    "1B/looped_hybrid_gdn_4to1_1B.yaml",
]


@pytest.mark.parametrize("recipe", NAMED)
def test_the_recipe_is_there(recipe):
    """tests/LT2/test_recipes.py builds all of RECIPES on meta."""
    assert CONFIGS / recipe in RECIPES
    args = read_recipe(CONFIGS / recipe)
    used = {spec.mixer for loop in args.model.layout() for spec in loop}
    if recipe == "600M/debug.yaml":
        return
    assert (args.steps, args.data.seq_len, args.model.loop_count) == (255_000, 4096, 4)
    match recipe.split("_")[1:3]:
        case ["pure", mixer]:
            assert used == {mixer}
        case ["hybrid", "gdn" | "bookend"]:
            assert used == {"gdn", "full"}
        case ["hybrid", "128"]:
            assert used == {"window", "full"}
