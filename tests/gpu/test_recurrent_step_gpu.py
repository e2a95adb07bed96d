"""The Triton decode step of linear recurrences against its equations: output and state."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.recurrent_step import recurrent_step, recurrent_step_triton
from apps.LT2.kernel.recurrent_step.naive import recurrent_step_naive
from tests.tolerances import BF16_KERNEL, FP32, assert_same

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1, 1, 1), (2, 3, 96, 192), (1, 2, 64, 64), (2, 2, 128, 256), (3, 2, 24, 9)]


def make_inputs(B, H, K, V, decay: str, delta: bool, dtype=torch.float32):
    torch.manual_seed(0)
    qkv = [torch.randn(B, H, dim) for dim in (K, K, V)]
    qkv[1] /= K**0.5
    g = {"none": None, "head": -torch.rand(B, H, 1), "channel": -torch.rand(B, H, K)}[decay]
    beta = 2 * torch.rand(B, H) if delta else None
    inputs = [x.to(dtype).cuda() for x in qkv]
    inputs += [x if x is None else x.cuda() for x in (g, beta)]
    return inputs, torch.randn(B, H, K, V).cuda()


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_naive(shape, decay, delta):
    inputs, state = make_inputs(*shape, decay, delta)
    for _ in range(3):
        want, want_state = recurrent_step_naive(*inputs, state.clone(), shape[2] ** -0.5)
        o = recurrent_step(*inputs, state, impl="triton")
        assert_same(o, want, FP32, "o")
        assert_same(state, want_state, FP32, "state")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    inputs, state = make_inputs(2, 3, 96, 192, "head", True, dtype)
    want_state = state.clone()
    o = recurrent_step(*inputs, state, scale=0.5, impl="triton")
    want = recurrent_step(*inputs, want_state, scale=0.5, impl="torch")
    assert o.dtype == dtype
    assert_same(o, want, BF16_KERNEL, "o")
    assert_same(state, want_state, FP32, "state")


def test_strided_inputs_are_not_copied():
    (q, k, v, g, beta), state = make_inputs(2, 4, 32, 48, "head", True)
    fused = torch.cat([q, k, v], dim=-1)
    views = (*fused.split([32, 32, 48], dim=-1), g[:, :1].expand(2, 4, 1), beta.T.contiguous().T)
    want_state = state.clone()
    o = recurrent_step(*views, state, impl="triton")
    want = recurrent_step(*(x.contiguous() for x in views), want_state, impl="torch")
    assert_same(o, want, FP32, "o")
    assert_same(state, want_state, FP32, "state")


@pytest.mark.parametrize("decay, delta", [("none", True), ("channel", False)])
def test_operator_is_registered_well(decay, delta):
    inputs, state = make_inputs(2, 3, 64, 64, decay, delta)
    torch.library.opcheck(recurrent_step_triton, (*inputs, state, 0.125))


def test_unsupported_states_are_computed_in_torch():
    inputs, state = make_inputs(2, 3, 16, 16, "head", True)
    strided = state.mT.contiguous().mT
    o = recurrent_step(*inputs, strided)
    assert_same(o, recurrent_step(*inputs, state, impl="triton"), FP32, "o")
    assert_same(strided, state, FP32, "state")
