"""Short convolution: the parallel form, its states and its steps against the definition."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.short_conv import conv_state, short_conv, short_conv_step
from apps.LT2.kernel.short_conv.naive import short_conv_naive
from tests.tolerances import BY_DTYPE, FP32, FP64, assert_same

C = 6


def make_inputs(B, T, N, k, *, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (B, T, C), (C, k), (N, k - 1, C), (C,)
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def results(conv, inputs, **options):
    x, weight, state, bias = inputs
    y = conv(x, weight, bias, state=state, **options)
    torch.manual_seed(1)
    loss = (y * torch.randn(y.shape, dtype=torch.float64)).sum()
    return y, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 3, 20])
def test_equals_naive(T, k, activation, dtype):
    inputs = make_inputs(2, T, 2, k, dtype=dtype)
    got, want = (
        results(conv, inputs, activation=activation) for conv in (short_conv, short_conv_naive)
    )
    for name, a, b in zip(("y", "dx", "dweight", "dstate", "dbias"), got, want, strict=True):
        assert_same(a, b, BY_DTYPE[dtype], name)


@pytest.mark.parametrize("lengths", [(1, 2, 3, 4, 7), (0, 5, 0, 1, 0)], ids=str)
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("with_state", [False, True])
def test_documents_do_not_leak(lengths, k, with_state):
    """Packed documents equal separate ones: result, new state and gradients."""
    cu_seqlens = packed(lengths)
    x, weight, states, _ = make_inputs(1, sum(lengths), len(lengths), k)
    options = {"cu_seqlens": cu_seqlens, "state": states if with_state else None}
    y = short_conv(x, weight, **options)
    new_states = conv_state(x, k, **options)

    alone = []
    for n, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        state = states[n : n + 1] if with_state else None
        document = x[:, start:end]
        alone.append(short_conv_naive(document, weight, state=state) if end > start else document)
        assert torch.equal(new_states[n : n + 1], conv_state(document, k, state=state))
    want = torch.cat(alone, dim=1)
    assert_same(y, want, FP64, "y")

    leaves = [x, weight, states] if with_state else [x, weight]
    weighting = torch.randn_like(y)
    got_grads = torch.autograd.grad((y * weighting).sum(), leaves)
    want_grads = torch.autograd.grad((want * weighting).sum(), leaves)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert_same(a, b, FP64, "gradient")


@pytest.mark.parametrize("T", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("with_state", [False, True])
def test_state_is_the_last_inputs(T, with_state):
    x, _, state, _ = make_inputs(2, T, 2, 4)
    past = state if with_state else torch.zeros_like(state)
    got = conv_state(x, 4, state=state if with_state else None)
    assert torch.equal(got, torch.cat([past, x], dim=1)[:, -3:])


@pytest.mark.parametrize("split", [1, 2, 5, 9])
def test_split_anywhere_equals_whole(split):
    x, weight, state, _ = make_inputs(2, 10, 2, 4)
    want = short_conv(x, weight, state=state)
    middle = conv_state(x[:, :split], 4, state=state)
    first = short_conv(x[:, :split], weight, state=state)
    last = short_conv(x[:, split:], weight, state=middle)
    assert_same(torch.cat([first, last], dim=1), want, FP64)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_steps_equal_forward(k, activation, with_bias):
    x, weight, state, bias = [t.detach() for t in make_inputs(2, 7, 2, k, dtype=torch.float32)]
    bias = bias if with_bias else None
    want = short_conv(x, weight, bias, state=state, activation=activation)
    want_state = conv_state(x, k, state=state)
    storage = state.data_ptr()
    got = [short_conv_step(x[:, t], weight, state, bias, activation=activation) for t in range(7)]
    assert_same(torch.stack(got, dim=1), want, FP32, "y")
    assert torch.equal(state, want_state) and state.data_ptr() == storage


def test_half_precision_sums_in_fp32():
    x, weight, _, _ = [t.detach().bfloat16() for t in make_inputs(2, 30, 2, 4)]
    y = short_conv(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, short_conv(x.float(), weight.float()).bfloat16())


@pytest.mark.parametrize("cu_seqlens", [None, packed((5, 3, 12))], ids=["dense", "packed"])
def test_compiles_whole(cu_seqlens):
    def forward(x, weight):
        return short_conv(x, weight, cu_seqlens=cu_seqlens).sum()

    x, weight, _, _ = make_inputs(1, 20, 1, 4, dtype=torch.float32)
    want = torch.autograd.grad(forward(x, weight), (x, weight))
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weight), (x, weight))
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, FP32)
