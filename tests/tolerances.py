"""Tolerances by dtype, each written once with its reason.

Errors are ||got - want|| / ||want|| over the whole tensor (L2, in fp64). A bound is about ten times
the error of correct code, and a hundredth of the error of one wrong token in 200. Understand a
failure; never widen a bound for it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping

import torch
from torch import Tensor

# (test, tensor, error, bound) of every comparison; tests/gpu prints the worst ones.
measured: list[tuple[str, str, float, float]] = []

# Two orders of summation over a few hundred terms, forward and backward. Unit roundoff 1e-16.
FP64 = 1e-12

# The same with unit roundoff 6e-8. Chunked forms differ from their recurrences by up to 3e-7.
FP32 = 5e-6

# Gradients of a whole layer in fp32. A norm over a short or small vector magnifies rounding, and
# the sum over a batch has another order. Measured up to 4e-6.
FP32_GRAD = 3e-5

# A whole model in fp32, forward and backward. Each of up to 20 layers, with large weights for the
# test, magnifies the rounding of earlier layers. Measured up to 3e-5.
FP32_MODEL = 3e-4

# A kernel with inputs and intermediate matrices in bf16 (unit roundoff 4e-3) and sums in fp32,
# against fp32 arithmetic on the same inputs. Each result is rounded a few times with random sign,
# which partly averages out, and once more when stored. The chunked gated delta rule with each of
# these roundings simulated measures up to 4e-3 in every result and gradient.
BF16_KERNEL = 1e-2

# A mixer with weights and activations in bf16, against fp32 arithmetic on the same numbers: input,
# projections, mixing and output are rounded. Measured up to 1e-2.
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
    """Return the first difference by name as a traceback, "" if everything is equal."""
    try:
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert_same(got[name], tensor, bound, name)
    except AssertionError:
        return traceback.format_exc()
    return ""
