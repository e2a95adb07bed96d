"""Linear attention with one decay per head on CUDA: fla's kernels against the naive form."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.simple_gla import simple_gla, simple_gla_step
from apps.LT2.kernel.simple_gla.fla import OPERATOR
from tests.gpu.kernel_cases import DecayContract, H, loss_of, packed
from tests.tolerances import BF16_KERNEL, assert_same

pytestmark = pytest.mark.gpu

LENGTHS = (1, 63, 0, 65, 200, 64, 0)


class TestSimpleGLA(DecayContract):
    recurrence = staticmethod(simple_gla)
    step = staticmethod(simple_gla_step)
    operator = OPERATOR
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
    def test_kernel_equals_naive_at_head_dims_of_recipes(self, K, V):
        self.assert_kernel_is_right(self.inputs(2, 200, 2, K, V))
        inputs = self.inputs(1, sum(LENGTHS), len(LENGTHS), K, V)
        self.assert_kernel_is_right(inputs, cu_seqlens=packed(LENGTHS))

    @pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
    def test_operator_with_a_constant_decay_is_registered_well(self, documents):
        (q, k, v, g, state), cu_seqlens = self.case(documents)
        self.assert_registered((q, k, v, g.detach()[0, 0]), state, cu_seqlens)


class TestHeadsThatShareQueriesAndKeys(TestSimpleGLA):
    groups = 1

    def test_views_of_a_fused_projection(self):
        """q and k have fewer heads than v, as in the output of Mamba-2's convolution."""
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
