"""Options that are set and have no effect log a warning."""

from __future__ import annotations

from typing import Any

import pytest

from apps.LT2.evaluation.args import EvalArgs, LMHarnessArgs
from apps.LT2.mixers.dsa import DSAArgs
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.mixers.rotary import RopeScalingArgs
from apps.LT2.training.args import TrainArgs
from apps.LT2.training.unused_options import (
    options_without_effect,
    train_warnings,
    unused_options,
)
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.checkpoint import CheckpointArgs, SaveEvery
from lingua.metrics import LoggingArgs
from tests.LT2.tiny import KINDS

LINEAR = RopeScalingArgs(rope_type="linear", factor=2.0)
OWN_HEADS = GatedDeltaNetArgs(n_heads=2)


@pytest.mark.parametrize(
    "option, options, used_by",
    [
        ("gated_attn", {"mixer": "gdn", "gated_attn": True}, {"attention_pattern": "3:1"}),
        ("n_heads", {"mixer": "gdn", "n_heads": 4, "gdn": OWN_HEADS}, {"attention_pattern": "3:1"}),
        ("n_heads", {"mixer": "gdn", "n_heads": 4, "gdn": OWN_HEADS}, {"gdn": GatedDeltaNetArgs()}),
        ("gated_attn", {"mixer": "nsa", "n_heads": 16, "gated_attn": True}, {"mixer": "dsa"}),
        ("n_heads", {"mixer": "mamba2", "n_heads": 2}, {"mixer": "kda"}),
        ("n_kv_heads", {"mixer": "hgrn2", "n_kv_heads": 2}, {"mixer": "window"}),
        ("head_dim", {"mixer": "gdn", "head_dim": 16, "n_heads": 4}, {"n_heads": None}),
        ("head_dim", {"mixer": "mamba2", "head_dim": 16}, {"mixer": "full"}),
        ("rope_theta", {"mixer": "kda", "rope_theta": 5e5}, {"mixer": "retnet"}),
        ("rope_scaling", {"mixer": "retnet", "rope_scaling": LINEAR}, {"mixer": "nsa"}),
        ("attn_bias", {"mixer": "mamba2", "attn_bias": "qkv"}, {"mixer": "dsa"}),
        ("qk_norm", {"mixer": "gdn", "qk_norm": True}, {"mixer": "window"}),
        ("attn_impl", {"mixer": "gdn", "attn_impl": "sdpa"}, {"attention_pattern": "3:1"}),
        ("attn_impl", {"mixer": "dsa", "attn_impl": "sdpa"}, {"mixer": "full"}),
        ("sliding_window", {"mixer": "window", "sliding_window": 8}, {"mixer": "full"}),
        ("hybrid_mixer", {"mixer": "gdn", "hybrid_mixer": "dsa"}, {"attention_pattern": "3:1"}),
        (
            "mixer",
            {"mixer": "kda", "attention_pattern": "8->full"},
            {"attention_pattern": "kda->full"},
        ),
        ("gdn", {"mixer": "kda", "gdn": GatedDeltaNetArgs(expand_v=1.0)}, {"mixer": "gdn"}),
    ],
)
def test_an_option_that_no_layer_uses_has_a_warning(option, options, used_by):
    base: dict[str, Any] = {"n_layers": 4, "loop_count": 2}
    unused = unused_options(LoopedTransformerArgs(**base | options))
    assert unused[option].startswith(f"model.{option}")
    assert option not in unused_options(LoopedTransformerArgs(**base | options | used_by))


@pytest.mark.parametrize("kind", KINDS)
def test_the_options_of_every_kind_are_used(kind):
    assert unused_options(LoopedTransformerArgs(n_layers=3, **KINDS[kind])) == {}


@pytest.mark.parametrize(
    "rope_type, warned", [("llama3", ["model.rope_scaling.truncate"]), ("yarn", [])]
)
def test_an_option_of_another_scaling_has_a_warning(rope_type, warned):
    scaling = RopeScalingArgs(
        rope_type=rope_type, factor=4.0, original_max_position_embeddings=64, truncate=False
    )
    warnings = train_warnings(TrainArgs(model=LoopedTransformerArgs(rope_scaling=scaling)))
    assert [w.split()[0] for w in warnings if "rope_scaling" in w] == warned


def test_a_narrowed_full_layer_is_a_full_layer():
    options: dict[str, Any] = {"mixer": "gdn", "hybrid_mixer": "full", "attention_pattern": "3:1"}
    args = LoopedTransformerArgs(n_layers=4, sliding_window=8, **options)
    assert unused_options(args) == {}


@pytest.mark.parametrize(
    "options, is_used",
    [
        ({"mixer": "full"}, False),
        ({"mixer": "window"}, True),
        ({"attention_pattern": "8->99"}, False),
        ({"attention_pattern": "8->window"}, True),
        ({"mixer": "full", "sliding_window": 8}, False),
    ],
)
def test_a_sweep_leaves_out_a_window_that_no_layer_has(options, is_used):
    args = TrainArgs(model=LoopedTransformerArgs(n_layers=2, loop_count=2, **options))
    assert ("model.default_sliding_window" not in options_without_effect(args)) == is_used


def warnings(**options: Any) -> list[str]:
    return train_warnings(TrainArgs(model=LoopedTransformerArgs(max_seqlen=64, **options)))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"mixer": "window", "default_sliding_window": 64}, "default_sliding_window"),
        ({"attention_pattern": "8->99->full", "loop_count": 3}, "a window of 99 tokens"),
        ({"sliding_window": 100}, "a window of 100 tokens"),
        ({"mixer": "dsa", "dsa": DSAArgs(top_k=64)}, "model.dsa.top_k=64"),
    ],
)
def test_a_limit_beyond_the_sequence_has_a_warning(options, named):
    (warning,) = warnings(**options)
    assert named in warning


@pytest.mark.parametrize(
    "options",
    [
        {"default_sliding_window": 64},  # no layer has it
        {"mixer": "window", "default_sliding_window": 63},
        {"mixer": "dsa", "dsa": DSAArgs(top_k=63)},
    ],
)
def test_a_limit_within_the_sequence_has_none(options):
    assert warnings(**options) == []


@pytest.mark.parametrize(
    "options, named",
    [
        ({"logging": LoggingArgs(acc_freq=1)}, "logging.acc_freq=1"),
        ({"model": LoopedTransformerArgs(loop_loss="uniform")}, "model.loop_loss=uniform"),
        ({"model": LoopedTransformerArgs(loop_entropy=0.2)}, "model.loop_entropy=0.2"),
        ({"model": LoopedTransformerArgs(loop_loss_every=4)}, "model.loop_loss_every=4"),
        ({"eval": EvalArgs(stop_at="loss/val<=2")}, "eval.stop_at=loss/val<=2"),
        ({"async_eval_gpus": 1}, "async_eval_gpus=1"),
        ({"async_eval_gpus": 1, "eval": EvalArgs()}, "async_eval_gpus=1"),
        (
            {
                "async_eval_gpus": 1,
                "eval": EvalArgs(harness=LMHarnessArgs(tasks=["a"])),
                "checkpoint": CheckpointArgs(eval=SaveEvery(keep=2)),
            },
            "checkpoint.eval.keep=2",
        ),
    ],
)
def test_training_options_without_effect_have_a_warning(options, named):
    (warning,) = train_warnings(TrainArgs(**options))
    assert warning.startswith(named)


@pytest.mark.parametrize("steps, is_short", [(6, True), (1000, False)])
def test_loops_that_no_step_of_a_short_run_reaches_have_a_warning(steps, is_short):
    model = LoopedTransformerArgs(loop_count=4, loop_schedule="1@0, 2@0.5, 4@0.95")
    warnings = [w for w in train_warnings(TrainArgs(model=model, steps=steps)) if "no step" in w]
    assert len(warnings) == is_short
    assert all(w.endswith("set more than steps=6") for w in warnings)
