"""RMSNorm and the gated RMSNorm of training on CUDA against their definitions."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.gated_norm import gated_norm
from apps.LT2.kernel.gated_norm.fused import gated_norm_fused
from apps.LT2.kernel.gated_norm.naive import gated_norm_naive
from lingua.transformer import RMSNorm
from tests.tolerances import BF16_KERNEL, FP32_GRAD, assert_same

pytestmark = pytest.mark.gpu


def make(B, T, H, V, dtype=torch.bfloat16):
    """Make x, a row of each token that holds the gate, and the weight."""
    torch.manual_seed(0)
    x, row = torch.randn(B, T, H, V), torch.randn(B, T, H * V + 32)
    tensors = (x.cuda().to(dtype), row.cuda().to(dtype), torch.randn(V).cuda())
    return [t.requires_grad_() for t in tensors]


def gate_of(row, H, V):
    return row[..., 32:].unflatten(-1, (H, V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("B, T, H, V", [(2, 65, 3, 96), (3, 4096, 16, 192), (1, 1, 1, 64)])
def test_equals_naive(B, T, H, V, activation, dtype):
    tensors = make(B, T, H, V, dtype)
    dy = torch.randn(B, H, T, V, device="cuda").transpose(1, 2).to(dtype)
    results = []
    for norm, inputs in (
        (gated_norm, tensors),
        (gated_norm, tensors),
        (gated_norm_naive, [t.detach().float().requires_grad_() for t in tensors]),
    ):
        x, row, weight = inputs
        y = norm(x, gate_of(row, H, V), weight, 1e-5, activation)
        results.append((y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))))
    got, again, want = results
    for name, a, b, c in zip(("y", "dx", "dgate", "dweight"), got, again, want, strict=True):
        assert torch.equal(a, b), f"{name} does not repeat"
        assert_same(a, c, FP32_GRAD if dtype == torch.float32 else BF16_KERNEL, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(3, 65, 128), (2, 5, 3, 2048), (1, 1, 96)])
def test_eager_norm_equals_the_definition(shape, dtype):
    torch.manual_seed(0)
    x, dy = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    norm = RMSNorm(shape[-1], eps=1e-5).cuda()
    with torch.no_grad():
        norm.weight.normal_()
    wide, weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    want = (want, *torch.autograd.grad(want, (wide, weight), dy.double()))
    x = x.requires_grad_()
    got = norm(x)
    assert got.dtype == dtype
    got = (got, *torch.autograd.grad(got, (x, norm.weight), dy))
    for name, a, b in zip(("y", "dx", "dweight"), got, want, strict=True):
        assert_same(a, b, FP32_GRAD if dtype == torch.float32 else BF16_KERNEL, name)


def test_operator_is_registered_well():
    x, row, weight = make(2, 33, 2, 64)
    torch.library.opcheck(gated_norm_fused, (x, gate_of(row, 2, 64), weight, 1e-5, True))


def test_compiled_equals_naive():
    x, row, weight = make(2, 33, 2, 96)
    dy = torch.randn(2, 33, 2, 96, device="cuda").bfloat16()

    def run(norm, x, row, weight):
        y = norm(x, gate_of(row, 2, 96), weight, 1e-5, "silu")
        return y, *torch.autograd.grad(y, (x, row, weight), dy.to(y.dtype))

    got = run(torch.compile(gated_norm, fullgraph=True), x, row, weight)
    want = run(gated_norm_naive, *(t.detach().float().requires_grad_() for t in (x, row, weight)))
    for name, a, b in zip(("y", "dx", "dgate", "dweight"), got, want, strict=True):
        assert_same(a, b, BF16_KERNEL, name)
