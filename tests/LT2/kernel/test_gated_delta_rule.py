"""Gated delta rule: the chunked form and the step against the definition."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.gated_delta_rule import gated_delta_rule, gated_delta_step
from tests.LT2.kernel.recurrence_contract import H, K, RecurrenceContract, V, unit_vectors
from tests.tolerances import FP32, FP64, assert_same


class TestGatedDeltaRule(RecurrenceContract):
    recurrence = staticmethod(gated_delta_rule)
    step = staticmethod(gated_delta_step)
    names = ("q", "k", "v", "g", "beta", "state")

    def make_inputs(self, B, T, N, dtype, *, decay=1.0):
        return [
            unit_vectors(B, T, H, K, dtype=dtype),
            unit_vectors(B, T, H, K, dtype=dtype),
            torch.randn(B, T, H, V, dtype=dtype),
            -decay * torch.rand(B, T, H, dtype=dtype),
            2 * torch.rand(B, T, H, dtype=dtype),
            torch.randn(N, H, K, V, dtype=dtype),
        ]

    def test_naive_is_the_equation_of_the_paper(self):
        q, k, v, g, beta, state = self.inputs(1, 5, 1)
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
    def test_strong_decay_keeps_gradients_right(self, dtype):
        inputs = self.inputs(2, 150, 2, dtype=dtype, decay=20.0)
        with torch.no_grad():
            inputs[3][:, 30:60] = -1e-3  # weak after strong decay: small differences of large sums
            inputs[3][:, 100] = -200.0
        self.assert_chunked_is_right(inputs)

    def test_repeated_keys_written_with_full_strength(self):
        """beta 2 on one key flips the state at every token.

        Powers of the system's matrix overflow fp32; the entries of its inverse stay at 2.
        """
        inputs = self.inputs(1, 128, 1, dtype=torch.float32)
        with torch.no_grad():
            inputs[1][:] = inputs[1][:, :1]
            inputs[3].zero_()
            inputs[4].fill_(2.0)
        # 128 reflections keep all errors.
        self.assert_chunked_is_right(inputs, bound=10 * FP32)
