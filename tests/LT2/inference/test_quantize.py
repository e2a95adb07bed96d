"""8-bit weights: how far they are from the weights, which ones they replace, what is refused."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.flops import step_traffic
from apps.LT2.inference.load import fuse_projections, plain_steps
from apps.LT2.inference.quantize import check_weights, quantize_int8
from apps.LT2.mixers.gdn import GatedDeltaNet
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


@pytest.mark.parametrize(
    "weights, device, named",
    [("int4", "cuda", "auto, int8"), ("int8", "cpu", "GPU"), ("int8", "cuda", "dtype=bf16")],
)
def test_refused_weights(weights, device, named):
    with pytest.raises(UserError, match=f"weights={weights} .*{named}"):
        check_weights(weights, torch.device(device), torch.float32)


def test_why_decode_steps_run_slower_kernels():
    model = tiny_model()
    assert plain_steps(model, torch.bfloat16) is None
    assert "dtype=bf16" in str(plain_steps(model, torch.float32))
    for name, value in (("model.dim", 8192), ("gdn head", 4096)):
        wide = tiny_model()
        if name == "model.dim":
            wide.args.dim = value
        else:
            next(m for m in wide.modules() if isinstance(m, GatedDeltaNet)).key_dim = value
        assert name in str(plain_steps(wide, torch.bfloat16))
