"""KDA on CUDA: fla's kernels against the naive form in fp32."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.kda import kda, kda_step
from apps.LT2.kernel.kda.fla import OPERATOR
from tests.gpu.kernel_cases import DecayContract, H, unit_vectors

pytestmark = pytest.mark.gpu


class TestKDA(DecayContract):
    recurrence = staticmethod(kda)
    step = staticmethod(kda_step)
    operator = OPERATOR
    max_key_dim = 256
    unwritten_scores = True
    names = ("q", "k", "v", "g", "beta", "state")

    def make_inputs(self, B, T, N, K=64, V=64, *, decay=0.2):
        return [
            unit_vectors(B, T, H, K).bfloat16(),
            unit_vectors(B, T, H, K).bfloat16(),
            torch.randn(B, T, H, V).bfloat16(),
            -decay * torch.rand(B, T, H, K),
            2 * torch.rand(B, T, H),
            torch.randn(N, H, K, V),
        ]
