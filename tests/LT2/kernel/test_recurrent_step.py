"""The decode step of all linear recurrences against its equations."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.recurrent_step import recurrent_step
from apps.LT2.kernel.recurrent_step.naive import recurrent_step_naive
from tests.tolerances import BF16_KERNEL, FP32, assert_same

SHAPES = [(1, 1, 1, 1), (2, 3, 12, 20), (3, 2, 7, 5)]


def make_inputs(B, H, K, V, decay: str, delta: bool):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, dim) for dim in (K, K, V))
    g = {"none": None, "head": -torch.rand(B, H, 1), "channel": -torch.rand(B, H, K)}[decay]
    beta = 2 * torch.rand(B, H) if delta else None
    return (q, k / K**0.5, v, g, beta), torch.randn(B, H, K, V)


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("shape", SHAPES)
def test_step_equals_naive(shape, decay, delta, scale):
    inputs, state = make_inputs(*shape, decay, delta)
    want_scale = shape[2] ** -0.5 if scale is None else scale
    for _ in range(3):
        want, want_state = recurrent_step_naive(*inputs, state.clone(), want_scale)
        o = recurrent_step(*inputs, state, scale=scale)
        assert_same(o, want, FP32, "o")
        assert_same(state, want_state, FP32, "state")


def test_result_has_the_dtype_of_v_and_the_state_stays_fp32():
    (q, k, v, g, beta), state = make_inputs(2, 3, 12, 20, "head", True)
    half = [x.bfloat16() for x in (q, k, v)]
    want, want_state = recurrent_step_naive(*half, g, beta, state.clone(), 1.0)
    o = recurrent_step(*half, g, beta, state, scale=1.0)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_same(o, want, BF16_KERNEL, "o")
    assert_same(state, want_state, FP32, "state")
