"""Gated linear attention: the chunked form and the step against the definition."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.gla import gla, gla_step
from tests.LT2.kernel.recurrence_contract import H, K, RecurrenceContract, V
from tests.tolerances import FP64, assert_same


class TestGLA(RecurrenceContract):
    recurrence = staticmethod(gla)
    step = staticmethod(gla_step)
    names = ("q", "k", "v", "g", "state")

    def make_inputs(self, B, T, N, dtype, *, decay=1.0):
        return [
            torch.randn(B, T, H, K, dtype=dtype),
            torch.randn(B, T, H, K, dtype=dtype),
            torch.randn(B, T, H, V, dtype=dtype),
            -decay * torch.rand(B, T, H, K, dtype=dtype),
            torch.randn(N, H, K, V, dtype=dtype),
        ]

    def test_naive_is_the_equation_of_the_paper(self):
        q, k, v, g, state = self.inputs(1, 5, 1)
        o, final = gla(q, k, v, g, state=state, impl="naive")
        for h in range(H):
            S = state[0, h]
            for t in range(5):
                S = torch.diag(g[0, t, h].exp()) @ S + torch.outer(k[0, t, h], v[0, t, h])
                assert_same(o[0, t, h], S.mT @ q[0, t, h] / K**0.5, FP64)
            assert_same(final[0, h], S, FP64)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
    def test_strong_decay_keeps_gradients_right(self, dtype):
        inputs = self.inputs(2, 150, 2, dtype=dtype, decay=20.0)
        with torch.no_grad():
            inputs[3][:, 30:60] = -1e-3  # weak after strong decay: small differences of large sums
            inputs[3][:, 100, :, ::2] = -200.0  # half of the channels are erased
            inputs[3][:, 90:120, :, 1::2] = 0.0
        self.assert_chunked_is_right(inputs)

    @pytest.mark.parametrize("impl", ["naive", "chunked"])
    def test_scale_multiplies_outputs_only(self, impl):
        *inputs, state = self.inputs(2, 20, 2)
        o, final = gla(*inputs, state=state, impl=impl)
        scaled, same_final = gla(*inputs, state=state, scale=3.0, impl=impl)
        assert_same(scaled, 3 * K**0.5 * o, FP64)
        assert torch.equal(final, same_final)
        token = [x.detach()[:, 0] for x in inputs]
        with torch.no_grad():
            got = gla_step(*token, state.float(), scale=3.0)
        assert_same(got, scaled[:, 0], 1e-6)
