"""Tests that every recurrence on CUDA kernels passes, against its definition in fp32.

A test file subclasses `KernelContract`, or `DecayContract` if the recurrence decays, and adds tests
for what is special about its operator. Kernels are compiled for every new head count and head dim,
so all tests share H and few head dims; conftest.py turns autotuning off.

Shapes: B rows, T tokens, N sequences, H heads, K key and V value head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.inference.cuda_graph import on_side_stream
from apps.LT2.kernel.fla import ChunkOperator
from lingua.errors import UserError
from tests.tolerances import BF16_KERNEL, FP32, assert_same

H = 2


def unit_vectors(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def packed(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def loss_of(o: Tensor, final: Tensor) -> Tensor:
    """Project o and the final state on random bf16 numbers, which add no rounding error."""
    torch.manual_seed(1)
    losses = [(x.float() * torch.randn(x.shape).bfloat16().to(x)).sum() for x in (o, final)]
    return losses[0] + losses[1]


class KernelContract:
    recurrence: ClassVar[Callable]  # (*inputs, state=, cu_seqlens=, impl=) -> o, final state
    step: ClassVar[Callable]  # step(*inputs of a token, state) -> o
    operator: ClassVar[ChunkOperator]
    names: ClassVar[tuple[str, ...]]  # of the inputs; q, k and v first, the state last
    max_key_dim: ClassVar[int | None] = None
    # Scores for later tokens are not written, so opcheck cannot compare compiled results.
    unwritten_scores: ClassVar[bool] = False

    def make_inputs(self, B: int, T: int, N: int, K: int = 64, V: int = 64) -> list[Tensor]:
        """Make q, k, v in bf16, the other inputs and N states in fp32, on the CPU."""
        raise NotImplementedError

    def inputs(self, *shape: int, **options: Any) -> list[Tensor]:
        """Make the same on the GPU, all requiring gradients."""
        torch.manual_seed(0)
        return [x.cuda().requires_grad_() for x in self.make_inputs(*shape, **options)]

    def run(self, inputs, impl: str, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        *inputs, state = inputs
        return self.recurrence(*inputs, state=state, cu_seqlens=cu_seqlens, impl=impl)

    def assert_kernel_is_right(self, inputs, *, cu_seqlens: Tensor | None = None) -> None:
        """Compare output, final state and every gradient."""
        exact = [x.detach().float().requires_grad_() for x in inputs]
        o, final = self.run(inputs, "fla", cu_seqlens=cu_seqlens)
        want_o, want_final = self.run(exact, "naive", cu_seqlens=cu_seqlens)
        assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
        assert_same(o, want_o, BF16_KERNEL, "o")
        assert_same(final, want_final, BF16_KERNEL, "final state")

        got = torch.autograd.grad(loss_of(o, final), inputs)
        want = torch.autograd.grad(loss_of(want_o, want_final), exact)
        for name, x, a, b in zip(self.names, inputs, got, want, strict=True):
            assert a.dtype == x.dtype, f"gradient of {name} is {a.dtype}"
            assert_same(a, b, BF16_KERNEL, f"gradient of {name}")

    @pytest.fixture
    def poisoned_memory(self):
        """Fill torch.empty with NaN, so an output that a kernel does not write cannot pass."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("T", [1, 63, 64, 65, 200, 1000])
    def test_kernel_equals_naive(self, T):
        self.assert_kernel_is_right(self.inputs(2, T, 2))

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("T", [65, 1000])
    def test_kernel_equals_naive_at_head_dim_128(self, T):
        self.assert_kernel_is_right(self.inputs(2, T, 2, 128, 128))

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("K, V", [(32, 64), (48, 32), (64, 16)])
    def test_head_dims_under_64_are_padded(self, K, V):
        """Some of fla's kernels read past the end of narrower q and k."""
        self.assert_kernel_is_right(self.inputs(2, 200, 2, K, V))

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_kernel_equals_naive_on_packed_documents(self, head_dim):
        lengths = (1, 63, 0, 65, 200, 64, 0)
        inputs = self.inputs(1, sum(lengths), len(lengths), head_dim, head_dim)
        self.assert_kernel_is_right(inputs, cu_seqlens=packed(lengths))

    @pytest.mark.parametrize("used", ["o", "final state"])
    def test_one_result_alone_can_be_differentiated(self, used):
        inputs = self.inputs(2, 65, 2)
        exact = [x.detach().float().requires_grad_() for x in inputs]
        grads = []
        for xs, impl in ((inputs, "fla"), (exact, "naive")):
            result = self.run(xs, impl)[0 if used == "o" else 1]
            # The final state does not depend on q: its gradient may be None or zeros.
            grads.append(
                torch.autograd.grad(
                    loss_of(result, torch.zeros(1, device="cuda")),
                    xs,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        for name, a, b in zip(self.names, *grads, strict=True):
            assert_same(a, b, BF16_KERNEL, f"gradient of {name}")

    @pytest.mark.parametrize("K", [32, 64])
    def test_results_are_the_same_beside_other_kernels(self, K):
        """A race in a kernel gives other bits when its warps are delayed."""
        inputs = self.inputs(2, 100, 2, K, 64)

        def results() -> list[Tensor]:
            o, final = self.run(inputs, "fla")
            return [o, final, *torch.autograd.grad(loss_of(o, final), inputs)]

        want, other = results(), torch.randn(4096, 4096, device="cuda").bfloat16()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for _ in range(100):
            with torch.cuda.stream(stream):  # enough for the time that the results take
                for _ in range(20):
                    other @ other
            for name, a, b in zip(("o", "final state", *self.names), results(), want, strict=True):
                assert torch.equal(a, b), name

    def test_no_state_is_a_state_of_zeros(self):
        *inputs, state = self.inputs(2, 65, 2)
        o, final = self.recurrence(*inputs, impl="fla")
        want_o, want_final = self.recurrence(*inputs, state=torch.zeros_like(state), impl="fla")
        assert torch.equal(o, want_o) and torch.equal(final, want_final)
        grads = torch.autograd.grad(loss_of(o, final), inputs)
        want = torch.autograd.grad(loss_of(want_o, want_final), inputs)
        assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))

    def test_views_of_a_fused_projection(self):
        """Views of one tensor are strided, and so is the gradient of o."""
        *inputs, state = self.inputs(2, 65, 2)
        fused = torch.cat(inputs[:3], dim=-1).detach().requires_grad_()
        o, _ = self.recurrence(*fused.split(64, dim=-1), *inputs[3:], state=state, impl="fla")
        want_o, _ = self.recurrence(*inputs, state=state, impl="fla")
        weight = torch.randn(2, H, 65, 64, device="cuda").transpose(1, 2).bfloat16()
        (got,) = torch.autograd.grad((o * weight).sum(), fused)
        want = torch.autograd.grad((want_o * weight).sum(), inputs[:3])
        assert torch.equal(o, want_o) and torch.equal(got, torch.cat(want, dim=-1))

    def test_cu_seqlens_overwritten_in_place(self):
        """fla caches chunk tables by the identity of cu_seqlens; new content needs new tables."""
        buffer = packed((100, 28))
        inputs = self.inputs(1, 128, 2)
        self.run(inputs, "fla", cu_seqlens=buffer)
        buffer.copy_(packed((30, 98)))
        self.assert_kernel_is_right(inputs, cu_seqlens=buffer)
        with torch.inference_mode():
            buffer = packed((100, 28))
            self.run(inputs, "fla", cu_seqlens=buffer)
            buffer.copy_(packed((30, 98)))
            o, _ = self.run(inputs, "fla", cu_seqlens=buffer)
            want, _ = self.run(inputs, "naive", cu_seqlens=buffer)
        assert_same(o, want, BF16_KERNEL, "o under inference mode")

    @pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
    def test_block_compiles_whole(self, documents):
        """Forward and backward are one graph each, with eager's results."""
        inputs, cu_seqlens = self.case(documents)

        def block(q, *others):
            o, final = self.run((q * 2, *others), "auto", cu_seqlens=cu_seqlens)
            return F.silu(o), final

        want = block(*inputs)
        torch.compiler.reset()
        got = torch.compile(block, fullgraph=True)(*inputs)
        want_grads = torch.autograd.grad(loss_of(*want), inputs)
        got_grads = torch.autograd.grad(loss_of(*got), inputs)
        for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
            assert_same(a, b, BF16_KERNEL)  # a fused silu does not round its input

    @pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
    @pytest.mark.parametrize("with_state", [False, True])
    def test_operator_is_registered_well(self, documents, with_state):
        inputs, cu_seqlens = self.case(documents)
        *inputs, state = inputs
        self.assert_registered(inputs, state if with_state else None, cu_seqlens)

    def assert_registered(self, inputs, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
        """Check schema, fake shapes, autograd and dynamic shapes with torch's own check."""
        operator, scale = self.operator, inputs[0].shape[-1] ** -0.5
        given = (*inputs, state, cu_seqlens, scale)
        if self.unwritten_scores:
            checks = ("test_schema", "test_autograd_registration", "test_faketensor")
            torch.library.opcheck(operator.forward, given, test_utils=checks)
        else:
            torch.library.opcheck(operator.forward, given)

        with torch.no_grad():
            o, final, *kept = operator.forward(*given)
        inputs = list(inputs)
        if "g" in self.names:
            inputs[3], *kept = kept  # the summed decay
        saved = (*inputs, *kept, state, cu_seqlens)
        saved = (*(x if x is None else x.detach() for x in saved), scale)
        for dfinal in (final, None):
            torch.library.opcheck(
                operator.backward,
                (*saved, o, dfinal),
                test_utils=("test_schema", "test_faketensor"),
            )

    def case(self, documents: tuple[int, ...] | None, **options: Any):
        """Make inputs of 200 tokens, and cu_seqlens."""
        if documents is None:
            return self.inputs(1, 200, 1, **options), None
        return self.inputs(1, 200, len(documents), **options), packed(documents)

    def test_unsupported_inputs_name_what_works(self):
        cases = [
            (self.inputs(1, 4, 1, 63, 64), "even key dim.*63"),
            ([x.detach().float() for x in self.inputs(1, 4, 1)], "impl='chunked'"),
        ]
        if self.max_key_dim is not None:
            cases.append((self.inputs(1, 4, 1, 2 * self.max_key_dim, 64), f"{self.max_key_dim}"))
        for inputs, message in cases:
            with pytest.raises(UserError, match=message):
                self.run(inputs, "fla")

    def test_auto_computes_fp32_inputs_in_fp32(self):
        exact = [x.detach().float() for x in self.inputs(2, 100, 2)]
        for got, want in zip(self.run(exact, "auto"), self.run(exact, "naive"), strict=True):
            assert_same(got, want, FP32)

    def test_step_in_a_cuda_graph_equals_naive(self):
        *inputs, state = [x.detach() for x in self.inputs(3, 12, 3, 96, 192)]
        exact = [x.float() for x in inputs]
        want, want_final = self.recurrence(*exact, state=state, impl="naive")

        token = [x[:, 0].clone() for x in inputs]
        working = state.clone()
        with on_side_stream():
            self.step(*token, working)  # warm up; the state is reset below
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.step(*token, working)

        working.copy_(state)
        got = []
        for t in range(12):
            for slot, x in zip(token, inputs, strict=True):
                slot.copy_(x[:, t])
            graph.replay()
            got.append(output.clone())
        # Computed in fp32, stored in bf16.
        assert_same(torch.stack(got, dim=1), want, BF16_KERNEL, "o")
        assert_same(working, want_final, FP32, "state")


class DecayContract(KernelContract):
    """The same for a recurrence with a decay g, the fourth input."""

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
    def test_strong_decay_keeps_gradients_right(self, documents):
        inputs, cu_seqlens = self.case(documents, decay=20.0)
        g = inputs[3]
        if g.ndim == 4:
            with torch.no_grad():
                g[:, 100, :, ::2] = -200.0  # half of the channels are erased, the others are not
                g[:, 90:120, :, 1::2] = 0.0
        self.assert_kernel_is_right(inputs, cu_seqlens=cu_seqlens)
