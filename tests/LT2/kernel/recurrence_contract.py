"""Tests that every recurrence passes on a CPU: its chunked form equals its definition.

A test file subclasses `RecurrenceContract` and adds tests for the equation and for what is special
about its recurrence.

Shapes: B rows, T tokens, N sequences, H heads, K key and V value head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lingua.errors import UserError
from tests.tolerances import BY_DTYPE, FP32, FP64, assert_same

H, K, V = 2, 8, 12


def unit_vectors(*shape: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def packed(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


class RecurrenceContract:
    recurrence: ClassVar[Callable]  # (*inputs, state=, cu_seqlens=, impl=) -> o, final state
    step: ClassVar[Callable]  # step(*inputs of a token, state) -> o
    names: ClassVar[tuple[str, ...]]  # of the inputs; q, k and v first, the state last

    def make_inputs(self, B: int, T: int, N: int, dtype: torch.dtype) -> list[Tensor]:
        """Make the inputs of B rows, and last the states of N sequences."""
        raise NotImplementedError

    def inputs(
        self, B: int, T: int, N: int, *, dtype: torch.dtype = torch.float64, **options: Any
    ) -> list[Tensor]:
        """Make the same, all requiring gradients."""
        torch.manual_seed(0)
        return [x.requires_grad_() for x in self.make_inputs(B, T, N, dtype, **options)]

    def run(self, inputs, impl: str, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        *inputs, state = inputs
        return self.recurrence(*inputs, state=state, cu_seqlens=cu_seqlens, impl=impl)

    def results(self, inputs, impl: str, *, cu_seqlens: Tensor | None = None) -> dict[str, Tensor]:
        """Return output, final state and the gradients of a random projection of both."""
        o, final = self.run(inputs, impl, cu_seqlens=cu_seqlens)
        torch.manual_seed(1)
        loss = sum((x * torch.randn(x.shape, dtype=torch.float64)).sum() for x in (o, final))
        gradients = torch.autograd.grad(loss, inputs)
        names = (f"gradient of {name}" for name in self.names)
        return {"o": o, "final state": final, **dict(zip(names, gradients, strict=True))}

    def assert_chunked_is_right(
        self, inputs, *, cu_seqlens: Tensor | None = None, bound: float | None = None
    ) -> None:
        got = self.results(inputs, "chunked", cu_seqlens=cu_seqlens)
        if bound is not None:  # the definition in fp32 is as inexact
            inputs = [x.detach().double().requires_grad_() for x in inputs]
        want = self.results(inputs, "naive", cu_seqlens=cu_seqlens)
        for name, x in got.items():
            assert_same(x, want[name], bound or BY_DTYPE[inputs[0].dtype], name)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
    @pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 200])
    def test_chunked_equals_naive(self, T, dtype):
        self.assert_chunked_is_right(self.inputs(2, T, 2, dtype=dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
    @pytest.mark.parametrize(
        "lengths",
        [(5, 1, 64, 3, 65), (0, 130, 0, 2, 63, 0), (200,), (1,) * 30],
        ids=lambda lengths: "-".join(map(str, lengths[:6])),
    )
    def test_chunked_equals_naive_on_packed_documents(self, lengths, dtype):
        inputs = self.inputs(1, sum(lengths), len(lengths), dtype=dtype)
        self.assert_chunked_is_right(inputs, cu_seqlens=packed(lengths))

    @pytest.mark.parametrize("impl", ["naive", "chunked"])
    def test_packed_documents_equal_separate_ones(self, impl):
        lengths = (70, 0, 3, 64)
        cu_seqlens = packed(lengths)
        *inputs, states = self.inputs(1, sum(lengths), len(lengths))
        o, final = self.run((*inputs, states), impl, cu_seqlens=cu_seqlens)
        for n, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
            if start == end:
                assert torch.equal(final[n], states[n])
                continue
            document = [x[:, start:end] for x in inputs]
            want_o, want_final = self.run((*document, states[n : n + 1]), impl)
            assert_same(o[:, start:end], want_o, FP64, f"o of document {n}")
            assert_same(final[n : n + 1], want_final, FP64, f"state of document {n}")

    @pytest.mark.parametrize("impl", ["naive", "chunked"])
    @pytest.mark.parametrize("split", [1, 37, 64, 99])
    def test_split_anywhere_equals_whole(self, split, impl):
        *inputs, state = self.inputs(2, 100, 2)
        want, want_final = self.run((*inputs, state), impl)
        first, middle = self.run((*(x[:, :split] for x in inputs), state), impl)
        last, final = self.run((*(x[:, split:] for x in inputs), middle), impl)
        assert_same(torch.cat([first, last], dim=1), want, FP64, "o")
        assert_same(final, want_final, FP64, "final state")

    @pytest.mark.parametrize("impl", ["naive", "chunked"])
    def test_no_state_is_a_state_of_zeros(self, impl):
        for lengths in (None, (0, 3, 67)):
            cu_seqlens = None if lengths is None else packed(lengths)
            *inputs, state = self.inputs(1, 70, 1 if lengths is None else 3)
            want = self.run((*inputs, torch.zeros_like(state)), impl, cu_seqlens=cu_seqlens)
            got = self.run((*inputs, None), impl, cu_seqlens=cu_seqlens)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])

    @pytest.mark.parametrize("impl", ["naive", "chunked"])
    def test_initial_state_is_neither_changed_nor_returned(self, impl):
        inputs = [x.detach() for x in self.inputs(1, 5, 3)]
        before = inputs[-1].clone()
        _, final = self.run(inputs, impl, cu_seqlens=packed((0, 5, 0)))
        final.zero_()
        assert torch.equal(inputs[-1], before)

    @pytest.mark.parametrize("impl", ["naive", "chunked"])
    def test_half_precision_inputs_are_computed_in_fp32(self, impl):
        q, k, v, *others = self.inputs(2, 70, 2, dtype=torch.float32)
        half = [x.bfloat16() for x in (q, k, v)]
        o, final = self.run((*half, *others), impl)
        want, want_final = self.run((*(x.float() for x in half), *others), "naive")
        assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
        assert torch.equal(o, o.float().bfloat16())
        assert_same(final, want_final, FP32, "final state")
        assert_same(o, want, 2**-8, "o")  # rounded once, when stored

    def test_steps_equal_forward(self):
        *inputs, state = [x.detach() for x in self.inputs(3, 20, 3, dtype=torch.float32)]
        want, want_final = self.run((*inputs, state), "naive")
        storage = state.data_ptr()
        got = [self.step(*(x[:, t] for x in inputs), state) for t in range(20)]
        assert_same(torch.stack(got, dim=1), want, FP32, "o")
        assert_same(state, want_final, FP32, "state")
        assert state.data_ptr() == storage

    def test_fla_on_cpu_suggests_chunked(self):
        with pytest.raises(UserError, match="impl='chunked'"):
            self.run(self.inputs(1, 4, 1, dtype=torch.float32), "fla")
