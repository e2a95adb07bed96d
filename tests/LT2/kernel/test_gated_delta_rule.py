"""Gated delta rule: the chunked form against the definition, in results and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from apps.LT2.kernel.gated_delta_rule import gated_delta_rule, gated_delta_step
from lingua.args import UserError
from tests.tolerances import BY_DTYPE, FP32, FP64, assert_same

H, K, V = 2, 8, 12
NAMES = ("o", "final state", "dq", "dk", "dv", "dg", "dbeta", "dstate")


def make_inputs(B, T, N, *, dtype=torch.float64, decay=1.0, seed=0):
    """q, k, v, g, beta of B rows and the states of N sequences, all asking for gradients."""
    torch.manual_seed(seed)
    inputs = [
        F.normalize(torch.randn(B, T, H, K, dtype=dtype), dim=-1),
        F.normalize(torch.randn(B, T, H, K, dtype=dtype), dim=-1),
        torch.randn(B, T, H, V, dtype=dtype),
        -decay * torch.rand(B, T, H, dtype=dtype),
        2 * torch.rand(B, T, H, dtype=dtype),
        torch.randn(N, H, K, V, dtype=dtype),
    ]
    return [x.requires_grad_() for x in inputs]


def results(inputs, impl, *, cu_seqlens=None):
    """Outputs, final state and the gradients of a random projection of both."""
    q, k, v, g, beta, state = inputs
    o, final = gated_delta_rule(q, k, v, g, beta, state=state, cu_seqlens=cu_seqlens, impl=impl)
    torch.manual_seed(1)
    loss = sum((x * torch.randn(x.shape, dtype=torch.float64)).sum() for x in (o, final))
    return o, final, *torch.autograd.grad(loss, inputs)


def assert_all_same(got, want, bound):
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_same(a, b, bound, name)


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_naive_is_the_equation_of_the_paper():
    q, k, v, g, beta, state = make_inputs(1, 5, 1)
    o, final = gated_delta_rule(q, k, v, g, beta, state=state, impl="naive")
    for h in range(H):
        S = state[0, h]
        for t in range(5):
            key, b = k[0, t, h], beta[0, t, h]
            erase = torch.eye(K, dtype=S.dtype) - b * torch.outer(key, key)
            S = erase @ S * g[0, t, h].exp() + b * torch.outer(key, v[0, t, h])
            assert_same(o[0, t, h], S.mT @ q[0, t, h] / K**0.5, FP64)
        assert_same(final[0, h], S, FP64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_chunked_equals_naive(T, dtype):
    inputs = make_inputs(2, T, 2, dtype=dtype)
    assert_all_same(results(inputs, "chunked"), results(inputs, "naive"), BY_DTYPE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    "lengths",
    [(5, 1, 64, 3, 65), (0, 130, 0, 2, 63, 0), (200,), (1,) * 30],
    ids=lambda lengths: "-".join(map(str, lengths[:6])),
)
def test_chunked_equals_naive_on_packed_documents(lengths, dtype):
    inputs = make_inputs(1, sum(lengths), len(lengths), dtype=dtype)
    got, want = (results(inputs, impl, cu_seqlens=packed(lengths)) for impl in ("chunked", "naive"))
    assert_all_same(got, want, BY_DTYPE[dtype])


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_packed_documents_equal_separate_ones(impl):
    lengths = (70, 0, 3, 64)
    cu_seqlens = packed(lengths)
    *inputs, states = make_inputs(1, sum(lengths), len(lengths))
    o, final = gated_delta_rule(*inputs, state=states, cu_seqlens=cu_seqlens, impl=impl)
    for n, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        if start == end:
            assert torch.equal(final[n], states[n])
            continue
        document = [x[:, start:end] for x in inputs]
        want_o, want_final = gated_delta_rule(*document, state=states[n : n + 1], impl=impl)
        assert_same(o[:, start:end], want_o, FP64, f"o of document {n}")
        assert_same(final[n : n + 1], want_final, FP64, f"state of document {n}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_strong_decay_keeps_gradients_right(dtype):
    inputs = make_inputs(2, 150, 2, dtype=dtype, decay=20.0)
    with torch.no_grad():
        inputs[3][:, 30:60] = -1e-3  # weak decay after strong: small differences of large sums
        inputs[3][:, 100] = -200.0
    got = results(inputs, "chunked")
    assert all(x.isfinite().all() for x in got)
    assert_all_same(got, results(inputs, "naive"), BY_DTYPE[dtype])


def test_repeated_keys_written_with_full_strength():
    """beta 2 on one key flips the state at every token: powers of the system's matrix would
    overflow fp32 long before its inverse, whose entries stay at 2, loses a digit."""
    inputs = make_inputs(1, 128, 1, dtype=torch.float32)
    with torch.no_grad():
        inputs[1][:] = inputs[1][:, :1]
        inputs[3].zero_()
        inputs[4].fill_(2.0)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = results(inputs, "chunked"), results(exact, "naive")
    assert_all_same(got, want, 10 * FP32)  # 128 reflections, none of which forgets an error


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("split", [1, 37, 64, 99])
def test_split_anywhere_equals_whole(split, impl):
    *inputs, state = make_inputs(2, 100, 2)
    want, want_final = gated_delta_rule(*inputs, state=state, impl=impl)
    first, middle = gated_delta_rule(*(x[:, :split] for x in inputs), state=state, impl=impl)
    last, final = gated_delta_rule(*(x[:, split:] for x in inputs), state=middle, impl=impl)
    assert_same(torch.cat([first, last], dim=1), want, FP64, "o")
    assert_same(final, want_final, FP64, "final state")


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_no_state_is_a_state_of_zeros(impl):
    for lengths in (None, (0, 3, 67)):
        cu_seqlens = None if lengths is None else packed(lengths)
        *inputs, state = make_inputs(1, 70, 1 if lengths is None else 3)
        zeros = torch.zeros_like(state)
        want = gated_delta_rule(*inputs, state=zeros, cu_seqlens=cu_seqlens, impl=impl)
        got = gated_delta_rule(*inputs, cu_seqlens=cu_seqlens, impl=impl)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_initial_state_is_left_alone_and_not_returned(impl):
    *inputs, state = [x.detach() for x in make_inputs(1, 5, 3)]
    before = state.clone()
    _, final = gated_delta_rule(*inputs, state=state, cu_seqlens=packed((0, 5, 0)), impl=impl)
    final.zero_()
    assert torch.equal(state, before)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_half_precision_inputs_are_computed_in_fp32(impl):
    q, k, v, g, beta, state = make_inputs(2, 70, 2, dtype=torch.float32)
    half = [x.bfloat16() for x in (q, k, v)]
    o, final = gated_delta_rule(*half, g, beta, state=state, impl=impl)
    want, want_final = gated_delta_rule(
        *(x.float() for x in half), g, beta, state=state, impl="naive"
    )
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert torch.equal(o, o.float().bfloat16())
    assert_same(final, want_final, FP32, "final state")
    assert_same(o, want, 2**-8, "o")  # rounded once, on being stored


def test_steps_equal_forward():
    *inputs, state = [x.detach() for x in make_inputs(3, 20, 3, dtype=torch.float32)]
    want, want_final = gated_delta_rule(*inputs, state=state, impl="naive")
    storage = state.data_ptr()
    got = [gated_delta_step(*(x[:, t] for x in inputs), state) for t in range(20)]
    assert_same(torch.stack(got, dim=1), want, FP32, "o")
    assert_same(state, want_final, FP32, "state")
    assert state.data_ptr() == storage


def test_fla_on_cpu_names_what_works():
    *inputs, _ = make_inputs(1, 4, 1, dtype=torch.float32)
    with pytest.raises(UserError, match="impl='chunked'"):
        gated_delta_rule(*inputs, impl="fla")
