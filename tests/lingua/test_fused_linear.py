"""Fused linears of one input equal separate ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apps.LT2.inference.load import fuse_projections
from lingua.transformer import Linear, fuse_weights, fused_linear
from tests.LT2.mixer_cases import QWEN
from tests.LT2.tiny import KINDS, tiny_model
from tests.tolerances import BF16_KERNEL, FP32, FP32_MODEL, assert_same


def make_linears() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(8, n, bias=False) for n in (3, 5, 1)]


@pytest.mark.parametrize("shape", [(8,), (2, 8), (2, 7, 8)])
def test_fused_linears_equal_separate_ones(shape):
    linears, x = make_linears(), torch.randn(shape)
    want = [linear(x) for linear in linears]
    for got, wanted in zip(fused_linear(x, linears), want, strict=True):
        assert torch.equal(got, wanted)
    fuse_weights(linears)
    for got, wanted in zip(fused_linear(x, linears), want, strict=True):
        assert_same(got, wanted, FP32)


def test_fused_weights_stay_parameters_with_the_same_names():
    module = nn.ModuleList(make_linears())
    before = copy.deepcopy(module.state_dict())
    parameters = list(module.parameters())
    fuse_weights(list(module))  # pyright: ignore[reportArgumentType]
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))


def test_a_write_to_a_weight_changes_the_fused_one():
    linears, x = make_linears(), torch.randn(8)
    fuse_weights(linears)
    with torch.no_grad():
        linears[1].weight.fill_(0.5)
    assert_same(fused_linear(x, linears)[1], (0.5 * x.sum()).expand(5), FP32)


def test_biases_are_fused_too():
    """They stay fp32 parameters beside bf16 weights, and a linear without one adds nothing."""
    linears = [Linear(8, n, bias=n != 5) for n in (3, 5, 1)]
    for linear in linears:
        linear.weight.data = linear.weight.data.bfloat16()
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    want = [linear(x) for linear in linears]
    fuse_weights(linears)
    for got, wanted in zip(fused_linear(x, linears), want, strict=True):
        assert_same(got.float(), wanted.float(), BF16_KERNEL)
    before = fused_linear(x, linears)[2]
    with torch.no_grad():
        linears[2].bias.add_(4)
    assert_same(fused_linear(x, linears)[2].float(), before.float() + 4, BF16_KERNEL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_fused_projections_is_the_same_function(kind):
    model = tiny_model(kind, 2, **(QWEN if kind in ("full", "nsa", "dsa") else {}))
    fused = copy.deepcopy(model)
    fuse_projections(fused)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    names = [name for name, _ in fused.named_buffers() if name.endswith("fused_weight")]
    assert len(names) >= 2 * len(model.layers)  # of the mixer and of the feed-forward
    tokens = torch.randint(258, (2, 40))
    assert_same(fused(tokens), model(tokens), FP32_MODEL)
    caches = [m.init_cache(2, 40) for m in (fused, model)]
    for n, m in zip(caches, (fused, model), strict=True):
        m.prefill(tokens[:, :20], n)
    got, want = (m.step(tokens[:, 20:21], c) for m, c in zip((fused, model), caches, strict=True))
    assert_same(got, want, FP32_MODEL)
