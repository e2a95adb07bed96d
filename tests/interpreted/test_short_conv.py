"""The kernels of the short convolution against its definition."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.documents import local_positions
from apps.LT2.kernel.short_conv import fused, step
from apps.LT2.kernel.short_conv.fused import conv_unit_heads, short_conv_fused
from apps.LT2.kernel.short_conv.heads import unit_heads
from apps.LT2.kernel.short_conv.naive import short_conv_naive
from tests.tolerances import FP32, assert_same


@pytest.mark.parametrize(
    "B, T, C, k, with_bias, lengths, silu",
    [
        (1, 10, 100, 4, True, None, True),
        (3, 1, 65, 2, True, None, False),
        (1, 22, 30, 8, False, (1, 2, 0, 3, 9, 7), True),
    ],
)
def test_sequences_and_every_gradient(monkeypatch, B, T, C, k, with_bias, lengths, silu):
    """x is a view of a larger tensor, as in the fused projection of streams and gates.

    Programs of eight tokens, so that some begin inside a document.
    """
    shorten_programs(monkeypatch, 8)
    torch.manual_seed(0)
    wide = torch.randn(B, T, C + 5).requires_grad_()
    weight = torch.randn(C, k).requires_grad_()
    bias = torch.randn(C).requires_grad_() if with_bias else None
    inputs = [wide, weight] if bias is None else [wide, weight, bias]
    bounds = position = None
    if lengths is not None:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        position = local_positions(T, bounds, "cpu").int()
    probe = torch.randn(B, T, C)
    y = short_conv_fused(wide[..., 2 : C + 2], weight, bias, position, silu)
    got = torch.autograd.grad((y * probe).sum(), inputs)
    activation = "silu" if silu else None
    exact = {"cu_seqlens": bounds, "activation": activation}
    want_y = short_conv_naive(wide[..., 2 : C + 2], weight, bias, **exact)
    want = torch.autograd.grad((want_y * probe).sum(), inputs)
    assert_same(y, want_y, FP32, "y")
    for name, a, b in zip(("dx", "dweight", "dbias"), got, want, strict=False):
        assert_same(a, b, FP32, name)


@pytest.mark.parametrize(
    "B, T, H, K, V, k, lengths",
    [
        (2, 5, 2, 24, 16, 4, None),
        (1, 5, 1, 96, 140, 4, None),
        (1, 9, 2, 33, 8, 3, (1, 2, 0, 3, 3)),
    ],
)
def test_unit_heads_and_every_gradient(monkeypatch, B, T, H, K, V, k, lengths):
    shorten_programs(monkeypatch, 4)
    torch.manual_seed(0)
    C = H * (2 * K + V)
    wide = torch.randn(B, T, C + 5).requires_grad_()
    weight = torch.randn(C, k).requires_grad_()
    bounds = position = None
    if lengths is not None:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        position = local_positions(T, bounds, "cpu").int()
    grads = [torch.randn(B, H, T, dim).transpose(1, 2) for dim in (K, K, V)]
    streams = short_conv_naive(wide[..., 2 : C + 2], weight, cu_seqlens=bounds)
    results = []
    for heads in (
        conv_unit_heads(wide[..., 2 : C + 2], weight, position, H, K),
        unit_heads(streams, H, K),
    ):
        results.append((*heads, *torch.autograd.grad(heads, (wide, weight), grads)))
    for name, got, want in zip(("q", "k", "v", "dx", "dweight"), *results, strict=True):
        assert_same(got, want, FP32, name)


def shorten_programs(monkeypatch, n_tokens: int) -> None:
    monkeypatch.setattr(fused, "ROWS", n_tokens)
    monkeypatch.setitem(fused.BLOCK, "ROWS", n_tokens)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("k", [2, 4])
def test_steps(monkeypatch, k, silu):
    monkeypatch.setattr(step, "kernel_supports", lambda *_: True)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 70), torch.randn(60, k), torch.randn(60)
    x, state = x[..., :60], torch.randn(2, k - 1, 60)
    activation = "silu" if silu else None
    want = short_conv_naive(x, weight, bias, state=state, activation=activation)
    got = [step.short_conv_step_triton(x[:, t], weight, state, bias, silu) for t in range(9)]
    assert_same(torch.stack(got, dim=1), want, FP32, "y")
    assert torch.equal(state, x[:, 10 - k :])
