"""Gated linear attention on CUDA: fla's kernels against the naive form in fp32."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.gla import gla, gla_step
from apps.LT2.kernel.gla.fla import OPERATOR
from tests.gpu.kernel_cases import DecayContract, H

pytestmark = pytest.mark.gpu


class TestGLA(DecayContract):
    recurrence = staticmethod(gla)
    step = staticmethod(gla_step)
    operator = OPERATOR
    unwritten_scores = True
    names = ("q", "k", "v", "g", "state")

    def make_inputs(self, B, T, N, K=64, V=64, *, decay=0.2):
        return [
            torch.randn(B, T, H, K).bfloat16(),
            torch.randn(B, T, H, K).bfloat16(),
            torch.randn(B, T, H, V).bfloat16(),
            -decay * torch.rand(B, T, H, K),
            torch.randn(N, H, K, V),
        ]

    @pytest.mark.parametrize("impl", ["fla", "chunked"])
    def test_scale_multiplies_outputs(self, impl):
        *inputs, state = self.inputs(2, 65, 2)
        o, _ = gla(*inputs, state=state, impl=impl)
        scaled, _ = gla(*inputs, state=state, scale=0.5, impl=impl)
        assert torch.equal(scaled, 4 * o)  # K**-0.5 is 1/8: powers of 2 add no rounding
