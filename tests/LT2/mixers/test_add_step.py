"""A layer's decode step with fused weights equals the one with separate weights."""

from __future__ import annotations

import copy

import pytest
import torch

from apps.LT2.inference.load import fuse_projections
from apps.LT2.mixers import MIXERS
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from tests.tolerances import FP32, assert_same

VARIANTS = {
    **{name: {"mixer": name} for name in MIXERS},
    "gated": {"mixer": "full", "gated_attn": True},
    "gated dsa": {"mixer": "dsa", "gated_attn": True},
    "biases": {"mixer": "full", "attn_bias": "qkvo", "qk_norm": True},
    "no convolution": {"mixer": "gdn", "gdn": {"conv_size": 0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_with_fused_weights_equal_those_without(variant):
    """The norm, the convolution, the gate and the sums move into the products."""
    options = VARIANTS[variant]
    heads = 16 if options["mixer"] == "nsa" else 4
    sections = {"gdn": GatedDeltaNetArgs(**options["gdn"])} if "gdn" in options else {}
    args = LoopedTransformerArgs(
        dim=64, n_heads=heads, n_layers=1, loop_count=2, vocab_size=40, seed=0, **options | sections
    )
    torch.manual_seed(0)
    model = LoopedTransformer(args)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name or name.endswith((".wg.weight", ".bias")):
            torch.nn.init.normal_(parameter, 1.0)  # a new model's change nothing
    fused = copy.deepcopy(model)
    fuse_projections(fused)
    tokens = torch.randint(40, (3, 8))
    outputs = []
    for each in (model, fused):
        cache = each.init_cache(3, 10)
        prompts = each.prefill(tokens[:, :4], cache)
        steps = [each.step(tokens[:, t : t + 1], cache) for t in range(4, 8)]
        outputs.append(torch.cat([prompts, *steps], 1))
    assert_same(outputs[1], outputs[0], FP32, variant)
