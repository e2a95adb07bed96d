"""The chunked loss on CUDA, with compiled passes over the logits, against its definition."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel import linear_cross_entropy as module
from apps.LT2.kernel.linear_cross_entropy import linear_cross_entropy, naive_linear_cross_entropy
from tests.tolerances import BF16_KERNEL, FP32, assert_same

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n_tokens", [1, 64, 150])  # less than a chunk, a chunk, two and a part
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_equal_naive(n_tokens, dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 64)
    torch.manual_seed(0)
    hidden = torch.randn(n_tokens, 96, device="cuda", dtype=dtype).requires_grad_()
    weight = torch.randn(1001, 96, device="cuda", dtype=dtype).mul_(0.3).requires_grad_()
    target = torch.randint(1001, (n_tokens,), device="cuda")
    if n_tokens > 1:
        target[n_tokens // 2 :: 3] = -100
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]

    loss = linear_cross_entropy(hidden, weight, target)
    want = naive_linear_cross_entropy(*exact, target)
    assert_same(loss, want, FP32, "loss")  # products of bf16 numbers are exact in fp32
    grads = torch.autograd.grad(3 * loss, (hidden, weight))
    wants = torch.autograd.grad(3 * want, exact)
    bound = FP32 if dtype == torch.float32 else BF16_KERNEL
    for name, got, want in zip(("hidden", "weight"), grads, wants, strict=True):
        assert got.dtype == dtype
        assert_same(got, want, bound, name)
