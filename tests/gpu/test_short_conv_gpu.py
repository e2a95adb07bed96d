"""The kernels of the short convolution, eager and in compiled code, against the definition."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.inference.cuda_graph import on_side_stream
from apps.LT2.kernel.short_conv import short_conv, short_conv_step, short_conv_unit_heads
from apps.LT2.kernel.short_conv.fused import conv_unit_heads, short_conv_fused
from apps.LT2.kernel.short_conv.heads import unit_heads
from apps.LT2.kernel.short_conv.naive import short_conv_naive
from apps.LT2.kernel.short_conv.step import short_conv_step_triton
from tests.tolerances import BF16_KERNEL, FP32, assert_same

pytestmark = pytest.mark.gpu


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def inputs_of(x, weight, bias):
    return [t for t in (x, weight, bias) if t is not None]


def compare(conv, x, weight, bias, bound, **options):
    """Compare y and every gradient with the definition in fp32; the gradient of y is strided."""
    torch.manual_seed(1)
    weighting = torch.randn(*x.shape[:2], 2 * x.shape[2], device="cuda").to(x.dtype)[..., ::2]
    y = conv(x, weight, bias, **options)
    got = torch.autograd.grad((y * weighting).sum(), inputs_of(x, weight, bias))
    exact = x.detach().float().requires_grad_()
    want_y = short_conv_naive(exact, weight, bias, **options)
    want = torch.autograd.grad((want_y * weighting.float()).sum(), inputs_of(exact, weight, bias))
    assert y.dtype == x.dtype and got[0].dtype == x.dtype
    names = ("y", "dx", "dweight", "dbias")
    for name, a, b in zip(names, (y, *got), (want_y, *want), strict=False):
        assert_same(a, b, bound, name)


def make(B, T, C, k, *, with_bias=True, dtype=torch.float32):
    """Make inputs; x is a view of a larger tensor, as in the fused projection of a mixer."""
    torch.manual_seed(0)
    x = torch.randn(B, T, C + 8, device="cuda").to(dtype)[..., 8:].requires_grad_()
    weight = torch.randn(C, k, device="cuda").requires_grad_()
    return x, weight, torch.randn(C, device="cuda").requires_grad_() if with_bias else None


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_sequences_equal_naive(k, with_bias, activation):
    compare(short_conv, *make(2, 130, 300, k, with_bias=with_bias), FP32, activation=activation)


@pytest.mark.parametrize("T", [1, 3, 63, 64, 65, 200])
def test_lengths_that_do_not_fill_a_block(T):
    compare(short_conv, *make(3, T, 70, 4), FP32)


@pytest.mark.parametrize("lengths", [(1, 2, 0, 3, 60, 0, 134), (200,), (0, 64, 64, 72)], ids=str)
@pytest.mark.parametrize("k", [2, 4, 8])
def test_documents_do_not_leak(k, lengths):
    compare(short_conv, *make(1, 200, 96, k), FP32, cu_seqlens=packed(lengths))


@pytest.mark.parametrize("documents", [None, (1, 2, 0, 3, 94)], ids=["dense", "packed"])
def test_compiled_equals_naive(documents):
    cu_seqlens = None if documents is None else packed(documents)
    compiled = torch.compile(short_conv, fullgraph=True)
    tensors = make(1, 100, 256, 4, dtype=torch.bfloat16)
    compare(compiled, *tensors, BF16_KERNEL, cu_seqlens=cu_seqlens)


def test_operator_is_registered_well():
    x, weight, bias = make(2, 70, 64, 4)
    torch.library.opcheck(short_conv_fused, (x, weight, bias, None, True))
    position = torch.arange(70, dtype=torch.int32, device="cuda")
    torch.library.opcheck(short_conv_fused, (x, weight, None, position, False))


def compare_heads(conv, x, weight, H, K, bound, *, cu_seqlens=None):
    """Compare q, k, v and every gradient, twice, with the definition in fp32."""
    torch.manual_seed(1)
    B, T, C = x.shape
    grads = [torch.randn(B, H, T, d).cuda().transpose(1, 2) for d in (K, K, C // H - 2 * K)]
    results = []
    for _ in range(2):
        heads = conv(x, weight, H, K, cu_seqlens=cu_seqlens)
        assert all(head.is_contiguous() for head in heads)
        given = [grad.to(x.dtype) for grad in grads]
        results.append((*heads, *torch.autograd.grad(heads, (x, weight), given)))
    exact = x.detach().float().requires_grad_()
    heads = unit_heads(short_conv_naive(exact, weight, cu_seqlens=cu_seqlens), H, K)
    given = [grad.to(x.dtype).float() for grad in grads]
    want = (*heads, *torch.autograd.grad(heads, (exact, weight), given))
    for name, a, b, c in zip(("q", "k", "v", "dx", "dweight"), *results, want, strict=True):
        assert torch.equal(a, b), f"{name} does not repeat"
        assert_same(a, c, bound, name)


@pytest.mark.parametrize(
    "B, T, H, K, V, documents",
    [
        (2, 130, 3, 40, 64, None),
        (2, 65, 2, 33, 50, None),
        (1, 1, 1, 256, 256, None),
        (2, 1000, 4, 96, 192, None),
        (1, 200, 4, 96, 192, (1, 2, 0, 3, 60, 0, 134)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unit_heads_equal_naive(dtype, B, T, H, K, V, documents):
    x, weight, _ = make(B, T, H * (2 * K + V), 4, with_bias=False, dtype=dtype)
    cu_seqlens = None if documents is None else packed(documents)
    bound = FP32 if dtype == torch.float32 else BF16_KERNEL
    compare_heads(short_conv_unit_heads, x, weight, H, K, bound, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("documents", [None, (1, 2, 0, 3, 94)], ids=["dense", "packed"])
def test_compiled_unit_heads_equal_naive(documents):
    cu_seqlens = None if documents is None else packed(documents)
    x, weight, _ = make(1, 100, 2 * 384, 4, with_bias=False, dtype=torch.bfloat16)
    compiled = torch.compile(short_conv_unit_heads, fullgraph=True)
    compare_heads(compiled, x, weight, 2, 96, BF16_KERNEL, cu_seqlens=cu_seqlens)


def test_unit_heads_are_registered_well():
    x, weight, _ = make(2, 70, 2 * 64, 4, with_bias=False)
    position = torch.arange(70, dtype=torch.int32, device="cuda")
    for positions in None, position:
        torch.library.opcheck(conv_unit_heads, (x, weight, positions, 2, 20))


def test_step_in_a_cuda_graph_equals_naive():
    torch.manual_seed(0)
    x = torch.randn(3, 10, 64, device="cuda").bfloat16()
    weight = torch.randn(64, 4, device="cuda")
    want = short_conv_naive(x.float(), weight)

    token, state = x[:, 0].clone(), torch.zeros(3, 3, 64, device="cuda").bfloat16()
    with on_side_stream():
        short_conv_step(token, weight, state)  # warm up; the state is reset below
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = short_conv_step(token, weight, state)

    state.zero_()
    got = []
    for t in range(10):
        token.copy_(x[:, t])
        graph.replay()
        got.append(output.clone())
    assert_same(torch.stack(got, dim=1), want, BF16_KERNEL, "y")
    assert torch.equal(state, x[:, -3:])


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_step_equals_naive(k, with_bias, activation):
    """x is fp32, does not fill a block of channels, and is a view of a larger tensor."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 333, device="cuda")[..., :300]
    weight = torch.randn(300, k, device="cuda")
    bias = torch.randn(300, device="cuda") if with_bias else None
    state = torch.randn(2, k - 1, 300, device="cuda")
    want = short_conv_naive(x, weight, bias, state=state, activation=activation)
    got = [short_conv_step(x[:, t], weight, state, bias, activation=activation) for t in range(12)]
    assert_same(torch.stack(got, dim=1), want, FP32, "y")
    assert torch.equal(state, x[:, 13 - k :])


def test_step_is_registered_well():
    x, weight = torch.randn(2, 64, device="cuda"), torch.randn(64, 4, device="cuda")
    state = torch.randn(2, 3, 64, device="cuda")
    torch.library.opcheck(short_conv_step_triton, (x, weight, state, None, True))
