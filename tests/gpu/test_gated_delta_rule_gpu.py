"""Gated delta rule on CUDA: fla's kernels against the naive form in fp32."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.gated_delta_rule import gated_delta_rule, gated_delta_step
from apps.LT2.kernel.gated_delta_rule.fla import OPERATOR
from tests.gpu.kernel_cases import DecayContract, H, packed, unit_vectors

pytestmark = pytest.mark.gpu


class TestGatedDeltaRule(DecayContract):
    recurrence = staticmethod(gated_delta_rule)
    step = staticmethod(gated_delta_step)
    operator = OPERATOR
    max_key_dim = 256
    names = ("q", "k", "v", "g", "beta", "state")

    def make_inputs(self, B, T, N, K=64, V=64, *, decay=0.2):
        return [
            unit_vectors(B, T, H, K).bfloat16(),
            unit_vectors(B, T, H, K).bfloat16(),
            torch.randn(B, T, H, V).bfloat16(),
            -decay * torch.rand(B, T, H),
            2 * torch.rand(B, T, H),
            torch.randn(N, H, K, V),
        ]

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("T", [65, 1000])
    def test_kernel_equals_naive_at_the_default_head_dims(self, T):
        self.assert_kernel_is_right(self.inputs(2, T, 2, 96, 192))

    @pytest.mark.usefixtures("poisoned_memory")
    def test_packed_documents_at_the_default_head_dims(self):
        lengths = (1, 63, 0, 65, 200, 64, 0)
        inputs = self.inputs(1, sum(lengths), len(lengths), 96, 192)
        self.assert_kernel_is_right(inputs, cu_seqlens=packed(lengths))
