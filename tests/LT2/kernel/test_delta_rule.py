"""Delta rule: the chunked form and the step against the definition."""

from __future__ import annotations

import torch

from apps.LT2.kernel.delta_rule import delta_rule, delta_rule_step
from tests.LT2.kernel.recurrence_contract import H, K, RecurrenceContract, V, unit_vectors
from tests.tolerances import FP32, FP64, assert_same


class TestDeltaRule(RecurrenceContract):
    recurrence = staticmethod(delta_rule)
    step = staticmethod(delta_rule_step)
    names = ("q", "k", "v", "beta", "state")

    def make_inputs(self, B, T, N, dtype):
        return [
            unit_vectors(B, T, H, K, dtype=dtype),
            unit_vectors(B, T, H, K, dtype=dtype),
            torch.randn(B, T, H, V, dtype=dtype),
            2 * torch.rand(B, T, H, dtype=dtype),
            torch.randn(N, H, K, V, dtype=dtype),
        ]

    def test_naive_is_the_equation_of_the_paper(self):
        q, k, v, beta, state = self.inputs(1, 5, 1)
        o, final = delta_rule(q, k, v, beta, state=state, impl="naive")
        for h in range(H):
            S = state[0, h]
            for t in range(5):
                key, b = k[0, t, h], beta[0, t, h]
                erase = torch.eye(K, dtype=S.dtype) - b * torch.outer(key, key)
                S = erase @ S + b * torch.outer(key, v[0, t, h])
                assert_same(o[0, t, h], S.mT @ q[0, t, h] / K**0.5, FP64)
            assert_same(final[0, h], S, FP64)

    def test_a_key_written_with_strength_1_is_read_back(self):
        """beta 1 overwrites: S^T k is v afterwards."""
        _, k, v, beta, state = self.inputs(2, 70, 2)
        o, _ = delta_rule(k, k, v, torch.ones_like(beta), state=state)
        assert_same(o * K**0.5, v, FP64)

    def test_repeated_keys_written_with_full_strength(self):
        """beta 2 on one key flips the state at every token, without decay."""
        inputs = self.inputs(1, 128, 1, dtype=torch.float32)
        with torch.no_grad():
            inputs[1][:] = inputs[1][:, :1]
            inputs[3].fill_(2.0)
        self.assert_chunked_is_right(inputs, bound=10 * FP32)
