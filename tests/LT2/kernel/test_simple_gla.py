"""Linear attention with one decay per head: the chunked form against the definition."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.gla import gla
from apps.LT2.kernel.simple_gla import simple_gla, simple_gla_step
from tests.LT2.kernel.recurrence_contract import H, K, RecurrenceContract, V, packed
from tests.tolerances import FP32, FP64, assert_same


class TestSimpleGLA(RecurrenceContract):
    recurrence = staticmethod(simple_gla)
    step = staticmethod(simple_gla_step)
    names = ("q", "k", "v", "g", "state")
    groups = H

    def make_inputs(self, B, T, N, dtype, *, decay=1.0):
        return [
            torch.randn(B, T, self.groups, K, dtype=dtype),
            torch.randn(B, T, self.groups, K, dtype=dtype),
            torch.randn(B, T, H, V, dtype=dtype),
            -decay * torch.rand(B, T, H, dtype=dtype),
            torch.randn(N, H, K, V, dtype=dtype),
        ]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
    def test_strong_decay_keeps_gradients_right(self, dtype):
        inputs = self.inputs(2, 150, 2, dtype=dtype, decay=20.0)
        with torch.no_grad():
            inputs[3][:, 30:60] = -1e-3  # weak after strong decay: small differences of large sums
            inputs[3][:, 100] = -200.0
        self.assert_chunked_is_right(inputs)

    @pytest.mark.parametrize("impl", ["naive", "chunked"])
    def test_is_gla_whose_channels_share_a_decay(self, impl):
        q, k, v, g, state = self.inputs(2, 70, 2)
        got = simple_gla(q, k, v, g, state=state, scale=2.0, impl=impl)
        q, k = (x.repeat_interleave(H // self.groups, dim=2) for x in (q, k))
        g_BTHK = g[..., None].expand_as(k)
        want = gla(q, k, v, g_BTHK, state=state, scale=2.0, impl="naive")
        assert_same(got[0], want[0], FP64, "o")
        assert_same(got[1], want[1], FP64, "final state")


class TestHeadsThatShareQueriesAndKeys(TestSimpleGLA):
    groups = 1


LOG_DECAY = torch.tensor([-0.02, -0.7], dtype=torch.float64)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_constant_decay_is_the_parallel_form_of_retention(impl):
    """Equation 5 of https://arxiv.org/abs/2307.08621: (Q K^T . D) V, D_ts = gamma^(t - s)."""
    torch.manual_seed(0)
    T = 90
    q, k = torch.randn(2, 2, T, H, K, dtype=torch.float64)
    v = torch.randn(2, T, H, V, dtype=torch.float64)
    o, _ = simple_gla(q, k, v, LOG_DECAY, impl=impl)
    age = torch.arange(T)[:, None] - torch.arange(T)
    decay_HTT = (LOG_DECAY[:, None, None] * age).exp().tril()
    scores = torch.einsum("bthk,bshk->bhts", q, k) * decay_HTT / K**0.5
    assert_same(o, torch.einsum("bhts,bshv->bthv", scores, v), FP64)


@pytest.mark.parametrize("lengths", [None, (0, 65, 5)], ids=["dense", "packed"])
def test_constant_decay_is_the_same_decay_at_every_token(lengths):
    torch.manual_seed(0)
    n = 1 if lengths is None else len(lengths)
    cu_seqlens = None if lengths is None else packed(lengths)
    q, k = torch.randn(2, 1, 70, H, K, dtype=torch.float64)
    v = torch.randn(1, 70, H, V, dtype=torch.float64)
    state = torch.randn(n, H, K, V, dtype=torch.float64)
    options = {"state": state, "cu_seqlens": cu_seqlens}
    for got, want in zip(
        simple_gla(q, k, v, LOG_DECAY, **options),
        simple_gla(q, k, v, LOG_DECAY.expand(1, 70, H), impl="naive", **options),
        strict=True,
    ):
        assert_same(got, want, FP64)


def test_steps_of_a_constant_decay():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 20, 1, K)
    v, state = torch.randn(3, 20, H, V), torch.randn(3, H, K, V)
    g = LOG_DECAY.float()
    want, final = simple_gla(q, k, v, g, state=state, scale=1.0, impl="naive")
    got = [simple_gla_step(q[:, t], k[:, t], v[:, t], g, state, scale=1.0) for t in range(20)]
    assert_same(torch.stack(got, dim=1), want, FP32, "o")
    assert_same(state, final, FP32, "state")


def test_constant_decay_takes_no_gradient():
    q, k, v = torch.randn(3, 1, 4, H, K)
    with pytest.raises(AssertionError, match="no gradient"):
        simple_gla(q, k, v, LOG_DECAY.float().requires_grad_())
