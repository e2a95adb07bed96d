"""The kernels of the gated RMSNorm against autograd of the definition."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.gated_norm import fused
from apps.LT2.kernel.gated_norm.naive import gated_norm_naive
from tests.tolerances import FP32, assert_same


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("shape", [(2, 37, 3, 24), (1, 5, 2, 192)], ids=str)
def test_gated_norm(monkeypatch, shape, activation):
    """gate is a part of each token's row; some programs of backward have two blocks of rows."""
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: torch.no_grad())
    monkeypatch.setattr(fused, "ELEMENTS", 512)
    monkeypatch.setattr(fused, "PROGRAMS", 3)
    torch.manual_seed(0)
    B, T, H, V = shape
    x = (3 * torch.randn(shape)).requires_grad_()
    row = torch.randn(B, T, H * V + 8).requires_grad_()
    weight = torch.randn(V).requires_grad_()
    dy = torch.randn(B, H, T, V).transpose(1, 2)
    results = []
    for norm, option in (
        (fused.gated_norm_fused, activation == "silu"),
        (gated_norm_naive, activation),
    ):
        gate = row[..., 8:].unflatten(-1, (H, V))
        y = norm(x, gate, weight, 1e-5, option)
        results.append((y, *torch.autograd.grad(y, (x, row, weight), dy)))
    for name, got, want in zip(("y", "dx", "dgate", "dweight"), *results, strict=True):
        assert_same(got, want, FP32, name)
