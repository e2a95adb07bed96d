"""Decode steps with fused kernels: products of few rows, a step of Gated DeltaNet, whole models."""

from __future__ import annotations

import copy

import pytest
import torch

from apps.LT2.inference.cuda_graph import DecodeGraph
from apps.LT2.inference.load import cast_for_inference, fuse_projections
from apps.LT2.inference.quantize import quantize_int8
from apps.LT2.kernel.decode_linear import Conv, Norm, Weight, decode_linear, kernel_supports
from apps.LT2.kernel.gated_delta_rule import decode_triton as gdn_decode_triton
from apps.LT2.mixers import MIXERS
from apps.LT2.mixers.attention import AttentionCache
from apps.LT2.mixers.gdn import GatedDeltaNet, GatedDeltaNetArgs
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from tests.tolerances import BF16_KERNEL, assert_same

pytestmark = pytest.mark.gpu


def as_fp32(cache: AttentionCache) -> AttentionCache:
    return AttentionCache(cache.k_BSGK.float(), cache.v_BSGK.float(), cache.length_B.clone())


@pytest.mark.parametrize("form", ["norm, SwiGLU", "residual", "int8", "norm, convolution"])
@pytest.mark.parametrize(
    "B, K, N",
    [
        (1, 2048, 5632),
        (8, 3072, 2048),
        (5, 1000, 333),
        (16, 70, 9),
        (16, 2048, 333),
        (16, 4096, 40),
    ],
)
def test_product_of_few_rows(B, K, N, form):
    torch.manual_seed(0)
    rows = 2 * N if form in ("norm, SwiGLU", "int8") else N
    matrix = torch.randn(rows, K, device="cuda") / K**0.5
    weight, norm = Weight(matrix.bfloat16()), Norm(torch.rand(K, device="cuda") + 0.5, 1e-6)
    if form == "int8":
        scale = matrix.abs().amax(1) / 127
        int8 = (matrix / scale[:, None]).round().to(torch.int8)
        weight = Weight((int8 * scale[:, None]).bfloat16(), int8, scale)
    x, residual = torch.randn(2, B, max(K, N), device="cuda").bfloat16()
    x, residual = x[:, :K], residual[:, :N]
    C = N - 7 if N > 7 else N
    taps = torch.randn(C, 4, device="cuda"), torch.randn(C, device="cuda")
    conv = Conv(*taps, torch.randn(B, 3, C, device="cuda").bfloat16())
    want_conv = Conv(*taps, conv.state_BSC.float())
    options = {
        "norm, SwiGLU": {"norm": norm, "swiglu": True},
        "residual": {"residual_BN": residual},
        "int8": {"norm": norm, "swiglu": True},
        "norm, convolution": {"norm": norm, "conv": conv},
    }[form]
    wide = options | {"residual_BN": residual.float()} if form == "residual" else dict(options)
    if "conv" in wide:
        wide["conv"] = want_conv
    assert kernel_supports(x, weight)
    dense = weight.matrix_NK.float() if form != "int8" else int8 * scale[:, None]
    want = decode_linear(x.float(), Weight(dense), **wide)
    assert_same(decode_linear(x, weight, **options), want, BF16_KERNEL, "y")
    assert_same(conv.state_BSC, want_conv.state_BSC, BF16_KERNEL, "past inputs")


@pytest.mark.parametrize("K, V", [(96, 192), (128, 128), (20, 50)])
@pytest.mark.parametrize("allow_neg_eigval, few", [(False, 0), (True, 64)])
def test_step_of_gated_delta_net_between_its_projections(monkeypatch, K, V, allow_neg_eigval, few):
    monkeypatch.setattr(gdn_decode_triton, "FEW_PROGRAMS", few)
    torch.manual_seed(0)
    options = GatedDeltaNetArgs(head_dim=K, expand_v=V / K, allow_neg_eigval=allow_neg_eigval)
    with torch.device("cuda"):
        layer = GatedDeltaNet(LoopedTransformerArgs(dim=96, n_heads=3), options)
        layer.reset_parameters(None, 1.0)
        layer.requires_grad_(False)
        torch.nn.init.normal_(layer.get_parameter("norm.weight"), 1.0)
        cache = layer.init_cache(4, 8, torch.zeros(1, dtype=torch.bfloat16))
        cache.state_BHKV.normal_()
        streams = torch.randn(4, 3 * (2 * K + V))
        rest = (torch.randn(4, 3 * V), torch.randn(4, 3), torch.randn(4, 3))
    streams, rest = streams.bfloat16(), tuple(x.bfloat16() for x in rest)
    want_cache = copy.deepcopy(cache)
    want = layer.step_heads(streams.float(), tuple(x.float() for x in rest), want_cache)
    got = layer.step_heads(streams, rest, cache)
    assert_same(got, want, BF16_KERNEL, "y")
    assert_same(cache.state_BHKV, want_cache.state_BHKV, BF16_KERNEL, "state")


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("mixer", ["hybrid", *MIXERS])
def test_fused_steps_are_as_close_to_fp32_as_plain_ones(mixer, B, weights):
    options = {"mixer": mixer}
    if mixer == "hybrid":
        options = {"mixer": "gdn", "attention_pattern": "1:1", "gated_attn": True}
    args = LoopedTransformerArgs(
        dim=256, n_heads=16 if mixer == "nsa" else 4, n_layers=2, vocab_size=300, **options
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        plain = LoopedTransformer(args)
        plain.init_weights()
    cast_for_inference(plain, torch.bfloat16)
    fused = copy.deepcopy(plain)
    fuse_projections(fused)
    exact = copy.deepcopy(plain).float()
    if weights == "int8":
        quantize_int8(fused)
        dequantize(fused, plain)
        dequantize(fused, exact)
    tokens = torch.randint(300, (B, 12), device="cuda")
    error = []
    with torch.no_grad():
        want = decode(exact, tokens)
        for model in (plain, fused):
            error.append((decode(model, tokens) - want).norm() / want.norm())
    assert error[1] < 1.25 * error[0] + 1e-4, f"{error[1]:.2e} fused, {error[0]:.2e} plain"


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("B", [1, 8])
def test_kernels_of_a_graph_that_start_early_change_no_bit(B, weights):
    """One that reads or writes too early would. Single launches are too slow to overlap."""
    torch.manual_seed(0)
    options = {"mixer": "gdn", "attention_pattern": "1:1", "gated_attn": True}
    args = LoopedTransformerArgs(
        dim=2048, n_layers=4, n_heads=16, vocab_size=300, loop_count=2, **options
    )
    with torch.device("cuda"):
        model = LoopedTransformer(args).requires_grad_(False)
        model.init_weights()
    cast_for_inference(model, torch.bfloat16)
    fuse_projections(model)
    if weights == "int8":
        quantize_int8(model)
    tokens = torch.randint(300, (B, 100), device="cuda").split(1, dim=1)
    cache = model.init_cache(B, 101)
    with torch.no_grad():
        single = [model.step(token, cache) for token in tokens]
        graph = DecodeGraph(model, model.init_cache(B, 101))
        assert torch.equal(
            torch.cat([graph.step(token).clone() for token in tokens]), torch.cat(single)
        )


def dequantize(source: LoopedTransformer, model: LoopedTransformer) -> None:
    """Give `model` the values of the 8-bit weights of `source`, in its own dtype."""
    fuse_projections(model)
    modules = dict(model.named_modules())
    for name, module in source.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        if "int8_weight" in buffers:
            exact = buffers["int8_weight"].float() * buffers["int8_scale"][:, None]
            modules[name].get_buffer("fused_weight").copy_(exact)
    for module in modules.values():
        module._buffers.pop("fused_weight", None)


def decode(model: LoopedTransformer, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of decode steps only."""
    cache = model.init_cache(len(tokens_BT), tokens_BT.shape[1])
    logits = [model.step(token, cache) for token in tokens_BT.split(1, dim=1)]
    return torch.cat(logits, dim=1).float().log_softmax(-1)
