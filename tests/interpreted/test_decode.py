"""The decode kernels of recurrences and of attention against their torch forms."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.attention import decode_triton
from apps.LT2.kernel.attention.decode import decode_attention
from apps.LT2.kernel.recurrent_step import recurrent_step
from apps.LT2.kernel.recurrent_step.triton import launch
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
