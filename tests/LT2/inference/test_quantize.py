"""8-bit weights: how far they are from the weights, which ones they replace, what is refused."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.flops import step_traffic
from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.inference.load import fuse_projections, plain_steps
from apps.LT2.inference.quantize import check_weights, quantize_int8, unread_int8
from apps.LT2.kernel import decode_linear
from apps.LT2.mixers.gdn import GatedDeltaNet
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.errors import UserError
from lingua.tokenizer import build_tokenizer


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


@pytest.mark.parametrize(
    "batch_size, max_normed_rows, read",
    [
        (16, 16, ("w1", "wq", "w2", "wo")),
        (16, 8, ("w2", "wo")),  # the kernels can't hold so many rows for the norm
        (17, 16, ()),
    ],
)
def test_a_step_moves_a_byte_for_each_8_bit_weight(monkeypatch, batch_size, max_normed_rows, read):
    monkeypatch.setattr(decode_linear, "fits", lambda B, K: max_normed_rows >= B)
    model = tiny_model()
    fuse_projections(model)
    before = step_traffic(model, batch_size, 8, torch.float32)
    quantize_int8(model)
    after = step_traffic(model, batch_size, 8, torch.float32)
    saved = 0
    for name, buffer in model.named_buffers():
        linear, _, kind = name.rpartition(".")
        if linear.endswith(read) and kind in ("int8_weight", "int8_scale"):
            saved += 3 * buffer.numel() if kind == "int8_weight" else -buffer.nbytes
    assert before.weights - after.weights == 2 * saved  # in each of two loops
    assert (saved > 0) == bool(read)


@pytest.mark.parametrize(
    "dim, batch_size, said",
    [
        (2048, 16, None),
        (2048, 17, "17 sequences read 16-bit weights: at most 16 read 8-bit ones; lower"),
        (4096, 8, None),
        (4096, 9, "weights in the products after a norm: at most 8 read 8-bit ones; lower"),
        (4097, 1, "weights in the products after a norm: model.dim=4097 is above 4096"),
        (4097, 17, "17 sequences read 16-bit weights: model.dim=4097 is above 4096"),
    ],
)
def test_a_warning_names_how_many_sequences_read_8_bits(dim, batch_size, said):
    warning = unread_int8(dim, batch_size, "max_tokens")
    assert warning is None if said is None else said in str(warning)


def test_generation_warns_once_of_weights_that_steps_do_not_read(caplog):
    model = tiny_model()
    fuse_projections(model)
    quantize_int8(model)
    cfg = PackedCausalTransformerGeneratorArgs(max_gen_len=2, max_tokens=400)
    generator = PackedCausalTransformerGenerator(cfg, model, build_tokenizer("bytes"))
    for n_prompts, n_warnings in ((16, 0), (17, 1), (18, 1)):
        generator.generate([[1, 2]] * n_prompts)
        assert len([r for r in caplog.records if "16-bit" in r.getMessage()]) == n_warnings


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
