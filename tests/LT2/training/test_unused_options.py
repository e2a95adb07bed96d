"""Nothing of `model:` that was set is ignored: what no layer reads is refused."""

from __future__ import annotations

from typing import Any

import pytest

from apps.LT2.mixers.dsa import DSAArgs
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.training.unused_options import check_unused_options, warnings_of_options
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.errors import UserError
from tests.LT2.tiny import KINDS

OWN_HEADS = GatedDeltaNetArgs(n_heads=2)


@pytest.mark.parametrize(
    "options, read_by",
    [
        ({"mixer": "gdn", "n_heads": 2, "gated_attn": True}, {"attention_pattern": "3:1"}),
        ({"mixer": "gdn", "n_heads": 4, "gdn": OWN_HEADS}, {"attention_pattern": "3:1"}),
        ({"mixer": "gdn", "n_heads": 4, "gdn": OWN_HEADS}, {"gdn": GatedDeltaNetArgs()}),
        ({"mixer": "nsa", "n_heads": 16, "gated_attn": True}, {"mixer": "dsa"}),
        ({"mixer": "mamba2", "n_heads": 2}, {"mixer": "kda"}),
        ({"mixer": "hgrn2", "n_kv_heads": 2}, {"mixer": "window"}),
        ({"mixer": "gdn", "head_dim": 16}, {"mixer": "full"}),
        ({"mixer": "kda", "rope_theta": 5e5}, {"mixer": "retnet"}),
        ({"mixer": "gdn", "attn_impl": "sdpa"}, {"attention_pattern": "3:1"}),
        ({"mixer": "dsa", "attn_impl": "sdpa"}, {"mixer": "full"}),
        ({"mixer": "window", "sliding_window": 8}, {"mixer": "full"}),
        ({"mixer": "gdn", "hybrid_mixer": "dsa"}, {"attention_pattern": "3:1"}),
        ({"mixer": "kda", "attention_pattern": "8->full"}, {"attention_pattern": "kda->full"}),
    ],
)
def test_an_option_that_no_layer_reads_is_refused(options, read_by):
    base: dict[str, Any] = {"n_layers": 4, "loop_count": 2}
    with pytest.raises(UserError, match=r"would change nothing: .*leave it out, or say"):
        check_unused_options(LoopedTransformerArgs(**base | options))
    check_unused_options(LoopedTransformerArgs(**base | options | read_by))


@pytest.mark.parametrize("kind", KINDS)
def test_what_every_kind_needs_is_read(kind):
    check_unused_options(LoopedTransformerArgs(n_layers=3, **KINDS[kind]))


def test_a_full_layer_that_is_narrowed_is_a_full_layer():
    options: dict[str, Any] = {"mixer": "gdn", "hybrid_mixer": "full", "attention_pattern": "3:1"}
    check_unused_options(LoopedTransformerArgs(n_layers=4, sliding_window=8, **options))


def warnings(**options: Any) -> list[str]:
    return list(warnings_of_options(LoopedTransformerArgs(max_seqlen=64, **options)))


def test_a_section_that_no_layer_reads_is_reported():
    section = GatedDeltaNetArgs(expand_v=1.0)
    assert warnings(mixer="kda", gdn=section) == ["model.gdn is set, and no layer is gdn"]
    assert warnings(mixer="gdn", gdn=section) == []


@pytest.mark.parametrize(
    "options, told",
    [
        ({"mixer": "window", "default_sliding_window": 64}, "a window of 64 keys hides nothing"),
        ({"attention_pattern": "8->99->full", "loop_count": 3}, "a window of 99 keys hides"),
        ({"sliding_window": 100}, "a window of 100 keys hides nothing in sequences of 64 tokens"),
        ({"mixer": "dsa", "dsa": DSAArgs(top_k=64)}, "model.dsa.top_k=64 leaves nothing to choose"),
    ],
)
def test_a_limit_beyond_the_sequence_is_reported(options, told):
    (warning,) = warnings(**options)
    assert warning.startswith(told)


@pytest.mark.parametrize(
    "options",
    [
        {"default_sliding_window": 64},  # no layer has it
        {"mixer": "window", "default_sliding_window": 63},
        {"mixer": "dsa", "dsa": DSAArgs(top_k=63)},
    ],
)
def test_a_limit_within_the_sequence_is_not(options):
    assert warnings(**options) == []
