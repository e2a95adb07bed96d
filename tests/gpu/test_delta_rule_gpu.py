"""Delta rule on CUDA: fla's kernels behind our operator against the definition in fp32."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.delta_rule import delta_rule, delta_rule_step
from lingua.errors import UserError
from tests.gpu.kernel_cases import H, KernelContract, packed, unit_vectors

pytestmark = pytest.mark.gpu


class TestDeltaRule(KernelContract):
    door = staticmethod(delta_rule)
    step = staticmethod(delta_rule_step)
    names = ("q", "k", "v", "beta", "state")

    def make_inputs(self, B, T, N, K=64, V=64):
        return [
            unit_vectors(B, T, H, K).bfloat16(),
            unit_vectors(B, T, H, K).bfloat16(),
            torch.randn(B, T, H, V).bfloat16(),
            # Nothing fades here. Up to 2 the state would flip at random, and gradients grow without
            # bound over 1000 tokens; up to 1, what was written is forgotten as it is overwritten.
            torch.rand(B, T, H),
            torch.randn(N, H, K, V),
        ]

    def test_strength_up_to_2(self):
        *others, beta, state = self.inputs(2, 65, 2)
        beta = (2 * beta.detach()).requires_grad_()
        self.assert_kernel_is_right([*others, beta, state])

    @pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
    @pytest.mark.parametrize("with_state", [False, True])
    def test_operator_is_registered_well(self, documents, with_state):
        """Schema, fake shapes, autograd and dynamic shapes, by torch's own check."""
        from apps.LT2.kernel.delta_rule.fla import _backward, _forward

        cu_seqlens = None if documents is None else packed(documents)
        *inputs, state = self.inputs(1, 200, 1 if documents is None else len(documents))
        state = state if with_state else None
        scale = inputs[0].shape[-1] ** -0.5
        torch.library.opcheck(_forward, (*inputs, state, cu_seqlens, scale))

        with torch.no_grad():
            o, final, solved = _forward(*inputs, state, cu_seqlens, scale)
            saved = (*inputs, solved, state, cu_seqlens)
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
