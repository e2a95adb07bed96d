"""8-bit weights: how far they are from the weights, which ones they replace, what is refused."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.flops import step_traffic
from apps.LT2.inference.load import fuse_projections
from apps.LT2.inference.quantize import check_weights, quantize_int8
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.errors import UserError


def tiny_model() -> LoopedTransformer:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(
        dim=64, n_heads=4, n_layers=3, loop_count=2, vocab_size=40, mixer="gdn", hybrid_mixer="dsa"
    )
    args.attention_pattern = "2:1"
    model = LoopedTransformer(args)
    model.init_weights()
    return model.requires_grad_(False)


def test_each_weight_moves_by_half_a_step_of_its_row_at_most():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fuse_projections(model)
    quantize_int8(model)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for name in moved:
        step = before[name].abs().amax(1, keepdim=True) / 127
        assert ((after[name] - before[name]).abs() <= 0.5001 * step).all(), name
    ends = {name.split(".", 2)[-1] for name in moved}
    ffn = {f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3")}
    assert ends == ffn | {f"gdn.{w}.weight" for w in ("wq", "wk", "wv", "wg", "wa", "wb", "wo")}


def test_a_step_moves_a_byte_for_each_quantized_weight():
    model = tiny_model()
    fuse_projections(model)
    before = step_traffic(model, 1, 8, torch.float32)
    quantize_int8(model)
    after = step_traffic(model, 1, 8, torch.float32)
    buffers = dict(model.named_buffers())
    saved = sum(3 * b.numel() for name, b in buffers.items() if name.endswith("int8_weight"))
    saved -= sum(b.nbytes for name, b in buffers.items() if name.endswith("int8_scale"))
    assert before.weights - after.weights == 2 * saved  # in each of two loops


@pytest.mark.parametrize("weights, named", [("int4", "auto, int8"), ("int8", "GPU")])
def test_refused_weights(weights, named):
    with pytest.raises(UserError, match=f"weights={weights} .*{named}"):
        check_weights(weights, torch.device("cpu"))
