"""The input products of the linear mixers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from apps.LT2.mixers.linear import FUSE_TOKENS, NARROW, WIDE, project_streams
from tests.tolerances import FP32, assert_same

DIM = 8


class Outputs(TorchDispatchMode):
    """Record how many outputs of all tokens the products and the concatenations have."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[str, list[int]] = {"aten::mm": [], "aten::cat": []}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in self.sizes and result.shape[0] == FUSE_TOKENS:
            self.sizes[name].append(result.shape[1])
        return result


# outputs of the streams, of the rest, of the products, and gradients that are concatenated
CASES = {
    "wide": ([WIDE // 2, WIDE // 2], [NARROW, 3, 5], [WIDE, NARROW, 8], [8]),
    "narrow rest": ([WIDE], [3, NARROW - 1, 5], [WIDE, NARROW + 7], [NARROW + 7]),
    "joined": ([16, 16], [NARROW, 3], [NARROW + 35], [NARROW + 35]),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_wide_products_are_not_concatenated(case):
    streams, rest, products, concatenated = CASES[case]
    torch.manual_seed(0)
    linears = [nn.Linear(DIM, size, bias=False) for size in (*streams, *rest)]
    weights, n = [linear.weight for linear in linears], len(streams)
    x = torch.randn(FUSE_TOKENS, DIM, requires_grad=True)
    with Outputs() as forward:
        first, others = project_streams(x, linears[:n], linears[n:])
    separate = [x @ weight.T for weight in weights]
    want = [torch.cat(separate[:n], dim=-1), *separate[n:]]
    dy = [torch.randn_like(y) for y in want]
    with Outputs() as backward:
        grads = torch.autograd.grad([first, *others], [x, *weights], dy)
    assert forward.sizes["aten::mm"] == products
    assert backward.sizes["aten::cat"] == concatenated
    want += torch.autograd.grad(want, [x, *weights], dy)
    for got, wanted in zip([first, *others, *grads], want, strict=True):
        assert_same(got, wanted, FP32)
