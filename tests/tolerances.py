"""How far apart two right answers may be: facts about dtypes, written once.

Errors are ||got - want|| / ||want|| over the whole tensor (L2, computed in fp64). A bound here is
some ten times what right code measures, and a hundredth of what one wrong token in 200 costs. A
test that fails is to be understood, not given a wider bound.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping

import torch
from torch import Tensor

# (test, tensor, error, bound) of every comparison so far; tests/gpu prints the worst of them.
measured: list[tuple[str, str, float, float]] = []

# Two orders of summation over a few hundred terms, forward and backward. Unit roundoff 1e-16.
FP64 = 1e-12

# The same, with a unit roundoff of 6e-8: chunked forms measure up to 3e-7 from their recurrences.
FP32 = 5e-6

# Gradients of a whole layer in fp32: a norm over a short or small vector magnifies what rounding
# left in it, and the sum over a batch is taken in another order. Measures up to 4e-6.
FP32_GRAD = 3e-5

# A whole model in fp32, forward and backward: each of up to 20 layers in a row, made lively for the
# test, magnifies the rounding of those before it. Measures up to 3e-5.
FP32_MODEL = 3e-4

# A kernel that keeps its inputs and intermediate matrices in bf16 (unit roundoff 4e-3) and sums in
# fp32, against fp32 arithmetic on the same bf16 inputs. Each result passes a few roundings, of
# random sign, which partly average out in sums over K or over a chunk, and a last one on being
# stored. The chunked gated delta rule with every such rounding put in by hand, forward and
# backward, measures up to 4e-3 in every result and gradient.
BF16_KERNEL = 1e-2

# A mixer whose matrices and activations are bf16, against fp32 arithmetic on the same numbers: the
# roundings of its input, of its projections, of the mixing and of its output. Measures up to 7e-3.
BF16_LAYER = 2e-2

BY_DTYPE = {torch.float64: FP64, torch.float32: FP32}


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    distance, size = (got - want).norm().item(), want.norm().item()
    return distance if size == 0 else distance / size


def assert_same(got: Tensor, want: Tensor, bound: float, name: str = "tensor") -> None:
    error = relative_error(got, want)
    measured.append((os.environ.get("PYTEST_CURRENT_TEST", ""), name, error, bound))
    assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.0e}"  # NaN fails too


def differences(got: Mapping[str, Tensor], want: Mapping[str, Tensor], bound: float) -> str:
    """What is not the same by name, as a traceback for a process to send; "" where all is."""
    try:
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert_same(got[name], tensor, bound, name)
    except AssertionError:
        return traceback.format_exc()
    return ""
