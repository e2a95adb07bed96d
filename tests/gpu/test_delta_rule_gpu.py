"""Delta rule on CUDA: fla's kernels against the naive form in fp32."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.delta_rule import delta_rule, delta_rule_step
from apps.LT2.kernel.delta_rule.fla import OPERATOR
from tests.gpu.kernel_cases import H, KernelContract, unit_vectors

pytestmark = pytest.mark.gpu


class TestDeltaRule(KernelContract):
    recurrence = staticmethod(delta_rule)
    step = staticmethod(delta_rule_step)
    operator = OPERATOR
    max_key_dim = 256
    names = ("q", "k", "v", "beta", "state")

    def make_inputs(self, B, T, N, K=64, V=64):
        return [
            unit_vectors(B, T, H, K).bfloat16(),
            unit_vectors(B, T, H, K).bfloat16(),
            torch.randn(B, T, H, V).bfloat16(),
            # Without decay, beta up to 2 flips the state at random and gradients explode over 1000
            # tokens. Up to 1, old values are overwritten.
            torch.rand(B, T, H),
            torch.randn(N, H, K, V),
        ]

    def test_strength_up_to_2(self):
        *others, beta, state = self.inputs(2, 65, 2)
        beta = (2 * beta.detach()).requires_grad_()
        self.assert_kernel_is_right([*others, beta, state])
