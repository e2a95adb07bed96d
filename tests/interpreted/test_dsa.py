"""The kernels of sparse attention and of its indexer against the definition.

In fp32 both choose the same keys: scores of random inputs differ by more than rounding.
"""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.dsa import Index, blocked, blocks, triton_index
from apps.LT2.kernel.dsa.naive import dsa_naive
from apps.LT2.kernel.dsa.selection import mask_bytes, select_top_k, unpack_bits
from apps.LT2.kernel.dsa.triton import differentiate
from tests.tolerances import FP32, FP32_GRAD, assert_same

NAMES = ("q", "k", "v", "index.q", "index.k", "index.w")


@pytest.mark.parametrize(
    "B, T, top_k, lengths, heads, max_choice",
    [
        (1, 17, 11, None, (4, 2, 16, 2, 16), 2**15),
        (2, 17, None, None, (1, 1, 16, 1, 16), 2**15),  # dense, as in warm-up
        (1, 21, 5, (1, 12, 0, 8), (3, 1, 24, 2, 20), 2**15),
        (1, 17, 7, None, (1, 1, 130, 1, 16), 2**15),  # the small tiles of large head dims
        (1, 21, 5, (7, 14), (2, 1, 16, 1, 16), 10),  # more keys than a program holds
    ],
)
def test_output_loss_and_every_gradient(monkeypatch, B, T, top_k, lengths, heads, max_choice):
    """Use blocks of at most 16 queries."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 16 * B * T)
    monkeypatch.setattr(triton_index, "MAX_CHOICE", max_choice)
    torch.manual_seed(0)
    H, G, K, J, C = heads
    shapes = [(B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, J, C), (B, T, C), (B, T, J)]
    inputs = [torch.randn(shape) for shape in shapes]
    inputs[-1] /= (J * C) ** 0.5
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v, *index = inputs
    out = blocked.forward_on_kernels(q, k, v, Index(*index), bounds, top_k or T, with_loss=True)
    do = torch.randn(out.o_BTHK.shape)
    grads = differentiate(q, k, v, out.bits_BTX, bounds, out.o_BTHK, out.lse_BHT, do)

    exact = [x.requires_grad_() for x in inputs]
    q, k, v, *index = exact
    options = {"top_k": top_k, "cu_seqlens": bounds, "with_loss": True}
    want_o, want_loss = dsa_naive(q, k, v, Index(*index), **options)
    assert want_loss is not None
    want = torch.autograd.grad((want_o * do).sum() + B * T * want_loss, exact)
    assert_same(out.o_BTHK, want_o, FP32, "o")
    assert_same(out.loss / (B * T), want_loss, FP32_GRAD, "loss")
    for name, a, b in zip(NAMES, (*grads, *out.index_grads), want, strict=True):
        assert_same(a, b, FP32_GRAD, f"gradient of {name}")


@pytest.mark.parametrize("special", [0.0, float("inf"), float("-inf"), 1e-45])
def test_scores_of_every_kind_are_in_order(special):
    """The search over bits handles ties, both zeros and infinities."""
    torch.manual_seed(0)
    T, top_k = 10, 5
    scores = torch.randn(1, T, T).round(decimals=1)
    scores[torch.rand_like(scores) < 0.3] = special
    scores[torch.rand_like(scores) < 0.1] *= -1
    want = select_top_k(scores, torch.ones(T, T, dtype=torch.bool).tril(), top_k)
    bits = torch.zeros(1, T, mask_bytes(T), dtype=torch.uint8)
    log_sum, start = torch.empty(1, T), torch.zeros(T, dtype=torch.int32)
    triton_index._select_kernel[T, 1](
        scores, bits, log_sum, start, 0, T, T, bits.shape[-1], top_k, BYTES=16, KEYS_LOG2=7
    )
    assert torch.equal(unpack_bits(bits, T), want)
    if abs(special) != float("inf"):
        assert_same(log_sum, scores.masked_fill(~want, float("-inf")).logsumexp(-1), FP32)
