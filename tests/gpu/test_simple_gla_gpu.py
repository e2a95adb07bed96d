"""Linear attention with one decay a head on CUDA: fla's kernels against the definition in fp32."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.simple_gla import simple_gla, simple_gla_step
from lingua.errors import UserError
from tests.gpu.kernel_cases import H, KernelContract, loss_of, packed
from tests.tolerances import BF16_KERNEL, assert_same

pytestmark = pytest.mark.gpu

LENGTHS = (1, 63, 0, 65, 200, 64, 0)


class TestSimpleGLA(KernelContract):
    door = staticmethod(simple_gla)
    step = staticmethod(simple_gla_step)
    names = ("q", "k", "v", "g", "state")
    groups = H

    def make_inputs(self, B, T, N, K=64, V=64, *, decay=0.2):
        return [
            torch.randn(B, T, self.groups, K).bfloat16(),
            torch.randn(B, T, self.groups, K).bfloat16(),
            torch.randn(B, T, H, V).bfloat16(),
            -decay * torch.rand(B, T, H),
            torch.randn(N, H, K, V),
        ]

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("K, V", [(128, 64), (128, 256)])
    def test_kernel_equals_naive_at_widths_of_recipes(self, K, V):
        self.assert_kernel_is_right(self.inputs(2, 200, 2, K, V))
        inputs = self.inputs(1, sum(LENGTHS), len(LENGTHS), K, V)
        self.assert_kernel_is_right(inputs, cu_seqlens=packed(LENGTHS))

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
    def test_strong_decay_keeps_gradients_right(self, documents):
        n = 2 if documents is None else len(documents)
        inputs = self.inputs(2 if documents is None else 1, 200, n, decay=20.0)
        self.assert_kernel_is_right(
            inputs, cu_seqlens=None if documents is None else packed(documents)
        )

    @pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
    @pytest.mark.parametrize("with_state", [False, True])
    @pytest.mark.parametrize("constant", [False, True])
    def test_operator_is_registered_well(self, documents, with_state, constant):
        """Schema, fake shapes, autograd and dynamic shapes, by torch's own check."""
        from apps.LT2.kernel.simple_gla.fla import _backward, _forward

        cu_seqlens = None if documents is None else packed(documents)
        q, k, v, g, state = self.inputs(1, 200, 1 if documents is None else len(documents))
        g = g.detach()[0, 0] if constant else g
        state = state if with_state else None
        scale = q.shape[-1] ** -0.5
        torch.library.opcheck(_forward, (q, k, v, g, state, cu_seqlens, scale))

        with torch.no_grad():
            o, final, g_read = _forward(q, k, v, g, state, cu_seqlens, scale)
            saved = (q, k, v, g_read, state, cu_seqlens)
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


class TestHeadsThatShareQueriesAndKeys(TestSimpleGLA):
    groups = 1

    def test_views_of_a_fused_projection(self):
        """q and k are narrower than v here: cut along heads, as the convolution's output is."""
        q, k, v, g, state = self.inputs(2, 65, 2)
        fused = torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1).detach().requires_grad_()
        parts = (x.unflatten(-1, (-1, 64)) for x in fused.split([64, 64, H * 64], dim=-1))
        o, _ = simple_gla(*parts, g, state=state, impl="fla")
        want_o, _ = simple_gla(q, k, v, g, state=state, impl="fla")
        (got,) = torch.autograd.grad(o.float().sum(), fused)
        want = torch.autograd.grad(want_o.float().sum(), (q, k, v))
        assert torch.equal(o, want_o)
        assert torch.equal(got, torch.cat([x.flatten(2) for x in want], dim=-1))


LOG_DECAY = (-0.02, -0.7)


@pytest.mark.parametrize("K, V", [(64, 64), (128, 256), (32, 48)])
@pytest.mark.parametrize("documents", [None, LENGTHS], ids=["dense", "packed"])
def test_constant_decay_equals_naive(K, V, documents):
    torch.manual_seed(0)
    T, n = (200, 1) if documents is None else (sum(documents), len(documents))
    cu_seqlens = None if documents is None else packed(documents)
    g = torch.tensor(LOG_DECAY, device="cuda")
    shapes = (1, T, H, K), (1, T, H, K), (1, T, H, V)
    inputs = [torch.randn(*shape).bfloat16() for shape in shapes]
    inputs = [x.cuda().requires_grad_() for x in (*inputs, torch.randn(n, H, K, V))]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    results = []
    for xs, impl in ((inputs, "fla"), (exact, "naive")):
        q, k, v, state = xs
        o, final = simple_gla(q, k, v, g, state=state, cu_seqlens=cu_seqlens, impl=impl)
        results.append((o, final, *torch.autograd.grad(loss_of(o, final), xs)))
    names = ("o", "final state", "dq", "dk", "dv", "dstate")
    for name, a, b in zip(names, *results, strict=True):
        assert_same(a, b, BF16_KERNEL, name)


def test_block_with_a_constant_decay_compiles_whole():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 200, H, 64).bfloat16().cuda().requires_grad_() for _ in range(3)]

    def block(q, k, v):
        g = torch.log1p(-torch.exp2(-5 - torch.arange(H, dtype=torch.float32, device=q.device)))
        return simple_gla(q * 2, k, v, g, scale=1.0)

    want = block(*inputs)
    torch.compiler.reset()
    got = torch.compile(block, fullgraph=True)(*inputs)
    want_grads = torch.autograd.grad(loss_of(*want), inputs)
    got_grads = torch.autograd.grad(loss_of(*got), inputs)
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert_same(a, b, BF16_KERNEL)
