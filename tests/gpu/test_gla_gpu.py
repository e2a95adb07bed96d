"""Gated linear attention on CUDA: fla's kernels behind our operator, against the definition."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.gla import gla, gla_step
from lingua.errors import UserError
from tests.gpu.kernel_cases import H, KernelContract, packed

pytestmark = pytest.mark.gpu


class TestGLA(KernelContract):
    door = staticmethod(gla)
    step = staticmethod(gla_step)
    names = ("q", "k", "v", "g", "state")

    def make_inputs(self, B, T, N, K=64, V=64, *, decay=0.2):
        return [
            torch.randn(B, T, H, K).bfloat16(),
            torch.randn(B, T, H, K).bfloat16(),
            torch.randn(B, T, H, V).bfloat16(),
            -decay * torch.rand(B, T, H, K),
            torch.randn(N, H, K, V),
        ]

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
    def test_strong_decay_keeps_gradients_right(self, documents):
        n = 2 if documents is None else len(documents)
        inputs = self.inputs(2 if documents is None else 1, 200, n, decay=20.0)
        with torch.no_grad():
            inputs[3][:, 100, :, ::2] = -200.0  # half of the channels forget, half do not
            inputs[3][:, 90:120, :, 1::2] = 0.0
        self.assert_kernel_is_right(
            inputs, cu_seqlens=None if documents is None else packed(documents)
        )

    @pytest.mark.parametrize("impl", ["fla", "chunked"])
    def test_scale_multiplies_outputs(self, impl):
        *inputs, state = self.inputs(2, 65, 2)
        o, _ = gla(*inputs, state=state, impl=impl)
        scaled, _ = gla(*inputs, state=state, scale=0.5, impl=impl)
        assert torch.equal(scaled, 4 * o)  # K**-0.5 is 1/8, and powers of 2 round nothing

    @pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
    @pytest.mark.parametrize("with_state", [False, True])
    def test_operator_is_registered_well(self, documents, with_state):
        """Schema, fake shapes and autograd, by torch's own check. Not its comparison of compiled
        results: the scores with later tokens are left unwritten. test_block_compiles_whole does."""
        from apps.LT2.kernel.gla.fla import _backward, _forward

        cu_seqlens = None if documents is None else packed(documents)
        *inputs, state = self.inputs(1, 200, 1 if documents is None else len(documents))
        state = state if with_state else None
        scale = inputs[0].shape[-1] ** -0.5
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(_forward, (*inputs, state, cu_seqlens, scale), test_utils=checks)

        with torch.no_grad():
            o, final, g_sum, scores = _forward(*inputs, state, cu_seqlens, scale)
            saved = (*inputs[:3], g_sum, scores, state, cu_seqlens)
            saved = (*(x if x is None else x.detach() for x in saved), scale)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(_backward, (*saved, o, final), test_utils=checks)
        torch.library.opcheck(_backward, (*saved, o, None), test_utils=checks)

    def test_unsupported_inputs_name_what_works(self):
        cases = [
            (self.inputs(1, 4, 1, 63, 64), "even.*63"),
            ([x.detach().float() for x in self.inputs(1, 4, 1)], "impl='chunked'"),
        ]
        for inputs, message in cases:
            with pytest.raises(UserError, match=message):
                self.run(inputs, "fla")
