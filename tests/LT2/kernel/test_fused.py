"""Functions that are compiled on CUDA have one version for any number of rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from apps.LT2.kernel.fused import fused_on_cuda


@pytest.mark.parametrize("first, then", [(8, 5), (5, 8)])
def test_one_version_for_any_number_of_rows(first, then, monkeypatch):
    versions = []

    def count(graph, inputs):
        versions.append(graph)
        return graph.forward

    @fused_on_cuda(2)
    def scaled(x_ND, scale_N, shift_D):
        return x_ND * scale_N[:, None] + shift_D

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    for n in (first, then, 3):
        x, scale, shift = torch.rand(n, 4), torch.rand(n), torch.rand(4)
        assert torch.equal(scaled(x, scale, shift), x * scale[:, None] + shift)
    assert len(versions) == 1
    scaled(torch.rand(6, 7), torch.rand(6), torch.rand(7))
    assert len(versions) == 2, "columns are constants of the code"
