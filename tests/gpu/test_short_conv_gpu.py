"""Short convolution on CUDA, compiled as the mixers compile it, in bf16, against the definition."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.short_conv import short_conv, short_conv_step
from apps.LT2.kernel.short_conv.naive import short_conv_naive
from apps.LT2.kernel.short_conv.step import short_conv_step_triton
from tests.tolerances import BF16_KERNEL, FP32, assert_same

pytestmark = pytest.mark.gpu


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


@pytest.mark.parametrize("documents", [None, (1, 2, 0, 3, 94)], ids=["dense", "packed"])
def test_compiled_equals_naive(documents):
    cu_seqlens = None if documents is None else packed(documents)
    torch.manual_seed(0)
    x = torch.randn(1, 100, 256, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(256, 4, device="cuda").requires_grad_()
    bias = torch.randn(256, device="cuda").requires_grad_()
    weighting = torch.randn(1, 100, 256, device="cuda").bfloat16()

    compiled = torch.compile(short_conv, fullgraph=True)
    y = compiled(x, weight, bias, cu_seqlens=cu_seqlens)
    got = torch.autograd.grad((y * weighting).sum(), (x, weight, bias))

    exact = x.detach().float().requires_grad_()
    want_y = short_conv_naive(exact, weight, bias, cu_seqlens=cu_seqlens)
    want = torch.autograd.grad((want_y * weighting.float()).sum(), (exact, weight, bias))
    assert y.dtype == torch.bfloat16
    names = ("y", "dx", "dweight", "dbias")
    for name, a, b in zip(names, (y, *got), (want_y, *want), strict=True):
        assert_same(a, b, BF16_KERNEL, name)


def test_step_in_a_cuda_graph_equals_naive():
    torch.manual_seed(0)
    x = torch.randn(3, 10, 64, device="cuda").bfloat16()
    weight = torch.randn(64, 4, device="cuda")
    want = short_conv_naive(x.float(), weight)

    token, tail = x[:, 0].clone(), torch.zeros(3, 3, 64, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        short_conv_step(token, weight, tail)  # warm-up, on a tail that is reset below
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = short_conv_step(token, weight, tail)

    tail.zero_()
    got = []
    for t in range(10):
        token.copy_(x[:, t])
        graph.replay()
        got.append(output.clone())
    assert_same(torch.stack(got, dim=1), want, BF16_KERNEL, "y")
    assert torch.equal(tail, x[:, -3:])


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_step_equals_naive(k, with_bias, activation):
    """In fp32, on channels that fill no block, read out of a wider tensor."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 333, device="cuda")[..., :300]
    weight = torch.randn(300, k, device="cuda")
    bias = torch.randn(300, device="cuda") if with_bias else None
    tail = torch.randn(2, k - 1, 300, device="cuda")
    want = short_conv_naive(x, weight, bias, tail=tail, activation=activation)
    got = [short_conv_step(x[:, t], weight, tail, bias, activation=activation) for t in range(12)]
    assert_same(torch.stack(got, dim=1), want, FP32, "y")
    assert torch.equal(tail, x[:, 13 - k :])


def test_step_is_registered_well():
    x, weight = torch.randn(2, 64, device="cuda"), torch.randn(64, 4, device="cuda")
    tail = torch.randn(2, 3, 64, device="cuda")
    torch.library.opcheck(short_conv_step_triton, (x, weight, tail, None, True))
