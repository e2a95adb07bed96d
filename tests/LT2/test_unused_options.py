"""Nothing of `model:` that was set is ignored: what no layer reads is refused."""

from __future__ import annotations

from typing import Any

import pytest

from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.transformer import LoopedTransformerArgs
from apps.LT2.unused_options import check_unused_options
from lingua.args import UserError
from tests.LT2.tiny import KINDS


@pytest.mark.parametrize(
    "options, read_by",
    [
        ({"mixer": "gdn", "n_heads": 2, "gated_attn": True}, {"attention_pattern": "3:1"}),
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


def test_a_section_that_no_layer_reads_is_reported(caplog):
    args = LoopedTransformerArgs(mixer="kda", gdn=GatedDeltaNetArgs(expand_v=1.0))
    check_unused_options(args)
    assert "model.gdn is set, and no layer is gdn" in caplog.text
