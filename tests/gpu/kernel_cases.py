"""What every recurrence on CUDA kernels promises, against its definition in fp32.

A test file has a subclass of `KernelContract` with the door, the step and inputs of its operator,
and tests of its own for what is special about it. Kernels are compiled for every new head count and
width, so all share H and few widths; conftest.py keeps them from being tuned for each.

Shapes: B rows, T tokens, N sequences, H heads, K key and V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerances import BF16_KERNEL, FP32, assert_same

H = 2


def unit_vectors(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def packed(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def loss_of(o: Tensor, final: Tensor) -> Tensor:
    """A random projection, of numbers that bf16 holds: their rounding is no error of a kernel."""
    torch.manual_seed(1)
    losses = [(x.float() * torch.randn(x.shape).bfloat16().to(x)).sum() for x in (o, final)]
    return losses[0] + losses[1]


class KernelContract:
    door: ClassVar[Callable]  # door(*inputs, state=, cu_seqlens=, impl=) -> o, final state
    step: ClassVar[Callable]  # step(*inputs of a token, state) -> o
    names: ClassVar[tuple[str, ...]]  # of the inputs, q, k and v first and the state last

    def make_inputs(self, B: int, T: int, N: int, K: int = 64, V: int = 64) -> list[Tensor]:
        """q, k, v in bf16, what else there is and the states of N sequences in fp32, on the CPU."""
        raise NotImplementedError

    def inputs(self, *shape: int, **options: Any) -> list[Tensor]:
        """The same on the GPU, all asking for gradients."""
        torch.manual_seed(0)
        return [x.cuda().requires_grad_() for x in self.make_inputs(*shape, **options)]

    def run(self, inputs, impl: str, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        *inputs, state = inputs
        return self.door(*inputs, state=state, cu_seqlens=cu_seqlens, impl=impl)

    def assert_kernel_is_right(self, inputs, *, cu_seqlens: Tensor | None = None) -> None:
        """Output, final state and every gradient."""
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
        """torch.empty holds NaN, so an output that a kernel does not write cannot pass."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("T", [1, 63, 64, 65, 200, 1000])
    def test_kernel_equals_naive(self, T):
        self.assert_kernel_is_right(self.inputs(2, T, 2))

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("T", [65, 1000])
    def test_kernel_equals_naive_on_wide_heads(self, T):
        self.assert_kernel_is_right(self.inputs(2, T, 2, 128, 128))

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("K, V", [(32, 64), (48, 32), (64, 16)])
    def test_widths_under_64_are_right_too(self, K, V):
        """Some of fla's own gradients are wrong there: they read past the end of q and k."""
        self.assert_kernel_is_right(self.inputs(2, 200, 2, K, V))

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("width", [64, 128])
    def test_kernel_equals_naive_on_packed_documents(self, width):
        lengths = (1, 63, 0, 65, 200, 64, 0)
        inputs = self.inputs(1, sum(lengths), len(lengths), width, width)
        self.assert_kernel_is_right(inputs, cu_seqlens=packed(lengths))

    @pytest.mark.parametrize("used", ["o", "final state"])
    def test_one_result_alone_can_be_differentiated(self, used):
        inputs = self.inputs(2, 65, 2)
        exact = [x.detach().float().requires_grad_() for x in inputs]
        grads = []
        for xs, impl in ((inputs, "fla"), (exact, "naive")):
            result = self.run(xs, impl)[0 if used == "o" else 1]
            # The final state does not depend on q: no gradient and one of zeros mean the same.
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

    def test_no_state_is_a_state_of_zeros(self):
        *inputs, state = self.inputs(2, 65, 2)
        o, final = self.door(*inputs, impl="fla")
        want_o, want_final = self.door(*inputs, state=torch.zeros_like(state), impl="fla")
        assert torch.equal(o, want_o) and torch.equal(final, want_final)
        grads = torch.autograd.grad(loss_of(o, final), inputs)
        want = torch.autograd.grad(loss_of(want_o, want_final), inputs)
        assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))

    def test_views_of_a_fused_projection(self):
        """q, k, v cut out of one tensor are strided; so may the gradient of o be."""
        *inputs, state = self.inputs(2, 65, 2)
        fused = torch.cat(inputs[:3], dim=-1).detach().requires_grad_()
        o, _ = self.door(*fused.split(64, dim=-1), *inputs[3:], state=state, impl="fla")
        want_o, _ = self.door(*inputs, state=state, impl="fla")
        weight = torch.randn(2, H, 65, 64, device="cuda").transpose(1, 2).bfloat16()
        (got,) = torch.autograd.grad((o * weight).sum(), fused)
        want = torch.autograd.grad((want_o * weight).sum(), inputs[:3])
        assert torch.equal(o, want_o) and torch.equal(got, torch.cat(want, dim=-1))

    def test_bounds_written_anew_in_the_same_buffer(self):
        """fla keeps chunk tables by the identity of cu_seqlens; a reused buffer needs new ones."""
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
        """Forward and backward in one graph each, with eager's results."""
        cu_seqlens = None if documents is None else packed(documents)
        inputs = self.inputs(1, 200, 1 if documents is None else len(documents))

        def block(q, *others):
            o, final = self.run((q * 2, *others), "auto", cu_seqlens=cu_seqlens)
            return F.silu(o), final

        want = block(*inputs)
        torch.compiler.reset()
        got = torch.compile(block, fullgraph=True)(*inputs)
        want_grads = torch.autograd.grad(loss_of(*want), inputs)
        got_grads = torch.autograd.grad(loss_of(*got), inputs)
        for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
            assert_same(a, b, BF16_KERNEL)  # a fused silu keeps digits that eager rounds away

    def test_auto_computes_fp32_inputs_in_fp32(self):
        exact = [x.detach().float() for x in self.inputs(2, 100, 2)]
        for got, want in zip(self.run(exact, "auto"), self.run(exact, "naive"), strict=True):
            assert_same(got, want, FP32)

    def test_step_in_a_cuda_graph_equals_naive(self):
        *inputs, state = [x.detach() for x in self.inputs(3, 12, 3, 96, 192)]
        exact = [x.float() for x in inputs]
        want, want_final = self.door(*exact, state=state, impl="naive")

        token = [x[:, 0].clone() for x in inputs]
        working = state.clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.step(*token, working)  # warm-up, on a state that is reset below
        torch.cuda.current_stream().wait_stream(stream)
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
