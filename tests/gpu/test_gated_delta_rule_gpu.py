"""Gated delta rule on CUDA: fla's kernels behind our operator against the definition in fp32."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.gated_delta_rule import gated_delta_rule, gated_delta_step
from lingua.errors import UserError
from tests.gpu.kernel_cases import H, KernelContract, packed, unit_vectors

pytestmark = pytest.mark.gpu


class TestGatedDeltaRule(KernelContract):
    door = staticmethod(gated_delta_rule)
    step = staticmethod(gated_delta_step)
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
    def test_kernel_equals_naive_at_widths_of_the_default(self, T):
        self.assert_kernel_is_right(self.inputs(2, T, 2, 96, 192))

    @pytest.mark.usefixtures("poisoned_memory")
    def test_packed_documents_at_widths_of_the_default(self):
        lengths = (1, 63, 0, 65, 200, 64, 0)
        inputs = self.inputs(1, sum(lengths), len(lengths), 96, 192)
        self.assert_kernel_is_right(inputs, cu_seqlens=packed(lengths))

    def test_strong_decay_keeps_gradients_right(self):
        self.assert_kernel_is_right(self.inputs(2, 200, 2, decay=20.0))

    @pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
    @pytest.mark.parametrize("with_state", [False, True])
    def test_operator_is_registered_well(self, documents, with_state):
        """Schema, fake shapes, autograd and dynamic shapes, by torch's own check."""
        from apps.LT2.kernel.gated_delta_rule.fla import _backward, _forward

        cu_seqlens = None if documents is None else packed(documents)
        *inputs, state = self.inputs(1, 200, 1 if documents is None else len(documents))
        state = state if with_state else None
        scale = inputs[0].shape[-1] ** -0.5
        torch.library.opcheck(_forward, (*inputs, state, cu_seqlens, scale))

        with torch.no_grad():
            o, final, g_sum, solved = _forward(*inputs, state, cu_seqlens, scale)
            q, k, v, _, beta = inputs
            saved = (q, k, v, g_sum, beta, solved, state, cu_seqlens)
            saved = (*(x if x is None else x.detach() for x in saved), scale)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(_backward, (*saved, o, final), test_utils=checks)
        torch.library.opcheck(_backward, (*saved, o, None), test_utils=checks)

    def test_unsupported_inputs_name_what_works(self):
        cases = [
            (self.inputs(1, 4, 1, 512, 64), "key width.*512"),
            (self.inputs(1, 4, 1, 63, 64), "even.*63"),
            ([x.detach().float() for x in self.inputs(1, 4, 1)], "impl='chunked'"),
        ]
        for inputs, message in cases:
            with pytest.raises(UserError, match=message):
                self.run(inputs, "fla")
