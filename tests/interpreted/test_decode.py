"""The decode kernels of recurrences and of attention against their torch forms."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.attention import decode_triton
from apps.LT2.kernel.attention.decode import decode_attention
from apps.LT2.kernel.decode_linear import Conv, Norm, Weight, decode_linear
from apps.LT2.kernel.decode_linear.triton import launch as launch_linear
from apps.LT2.kernel.gated_delta_rule.decode_triton import launch as launch_gdn
from apps.LT2.kernel.recurrent_step import recurrent_step
from apps.LT2.kernel.recurrent_step.triton import launch
from apps.LT2.mixers.gdn import GatedDeltaNet, GatedDeltaNetArgs
from apps.LT2.transformer import LoopedTransformerArgs
from tests.tolerances import FP32, assert_same


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("K, V", [(16, 24), (33, 130)])
def test_step_of_a_recurrence(K, V, decay, delta):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, K), torch.randn(2, 3, K) / K**0.5, torch.randn(2, 3, V)
    g = {"none": None, "head": -torch.rand(2, 3, 1), "channel": -torch.rand(2, 3, K)}[decay]
    beta = torch.rand(2, 3) if delta else None
    state = torch.randn(2, 3, K, V)
    want_state = state.clone()
    want = recurrent_step(q, k, v, g, beta, want_state, impl="torch")
    got = launch(q, k, v, g, beta, state, K**-0.5)
    assert_same(got, want, FP32, "o")
    assert_same(state, want_state, FP32, "state")


@pytest.mark.parametrize("H, G, K", [(4, 2, 16), (3, 1, 40)])
@pytest.mark.parametrize("n_valid", [(1, 65), (100, 200)], ids=str)
def test_attention_over_a_cache(monkeypatch, n_valid, H, G, K):
    """Some of the parts have no valid slot."""
    monkeypatch.setattr(decode_triton, "MIN_SLOTS", 64)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, H, K), torch.randn(2, 200, G, K), torch.randn(2, 200, G, K)
    valid = torch.tensor(n_valid)
    want = decode_attention(q, k, v, valid, impl="sdpa")
    assert_same(decode_triton.launch(q, k, v, valid), want, FP32, "o")


@pytest.mark.parametrize("form", ["norm, SwiGLU", "residual", "int8", "norm, convolution"])
@pytest.mark.parametrize("B, K, N", [(3, 96, 50), (9, 1100, 33)])
def test_product_of_few_rows(B, K, N, form):
    torch.manual_seed(0)
    rows = 2 * N if form in ("norm, SwiGLU", "int8") else N
    weight, norm = Weight(torch.randn(rows, K) / K**0.5), Norm(torch.rand(K) + 0.5, 1e-6)
    if form == "int8":
        int8, scale = torch.randint(-127, 128, (rows, K), dtype=torch.int8), torch.rand(rows) / 500
        weight = Weight(int8 * scale[:, None], int8, scale)
    C = N - 7
    conv = Conv(torch.randn(C, 4), torch.randn(C), torch.randn(B, 3, C))
    want_conv = conv._replace(state_BSC=conv.state_BSC.clone())
    x, residual = torch.randn(B, K), torch.randn(B, N)
    options = {
        "norm, SwiGLU": {"norm": norm, "swiglu": True},
        "residual": {"residual_BN": residual},
        "int8": {"swiglu": True, "residual_BN": residual},
        "norm, convolution": {"norm": norm, "conv": want_conv},
    }[form]
    want = decode_linear(x, weight, **options)
    matrix = weight.matrix_NK if weight.int8_NK is None else weight.int8_NK
    surroundings = [
        *(options.get("norm") or (None, 0.0)),
        options.get("residual_BN"),
        options.get("swiglu", False),
        *(conv if "conv" in options else (None, None, None)),
    ]
    got = launch_linear(x, matrix, weight.scale_N, *surroundings, early=False)
    assert_same(got, want, FP32, "y")
    assert_same(conv.state_BSC, want_conv.state_BSC, FP32, "past inputs")


@pytest.mark.parametrize("allow_neg_eigval, block_V", [(False, 256), (True, 16)])
def test_step_of_gated_delta_net_between_its_projections(allow_neg_eigval, block_V):
    torch.manual_seed(0)
    args = LoopedTransformerArgs(dim=48, n_heads=3)
    options = GatedDeltaNetArgs(head_dim=12, allow_neg_eigval=allow_neg_eigval)
    layer = GatedDeltaNet(args, options).requires_grad_(False)
    layer.reset_parameters(None, 1.0)
    torch.nn.init.normal_(layer.get_parameter("norm.weight"), 1.0)
    cache = layer.init_cache(2, 8, torch.zeros(1))
    cache.state_BHKV.normal_()
    state = cache.state_BHKV.clone()
    streams, rest = torch.randn(2, 3 * 48), (torch.randn(2, 72), *torch.randn(2, 2, 3) * 3)
    want = layer.step_heads(streams, rest, cache)
    parameters = [layer.A_log, layer.dt_bias, layer.norm.weight, layer.norm.eps]
    arguments = [streams, *rest, *parameters, allow_neg_eigval, state]
    got = launch_gdn(*arguments, early=False, BLOCK_V=block_V)
    assert_same(got, want, FP32, "y")
    assert_same(state, cache.state_BHKV, FP32, "state")
