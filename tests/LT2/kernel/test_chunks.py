"""Decay inside a chunk, also if its factors would overflow."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.chunks import ChannelDecay
from tests.tolerances import BY_DTYPE, FP64, assert_same


def scores_by_pairs(q, k, g):
    """Return sum_k q_ik k_jk exp(g_(j+1) + .. + g_i) for one chunk (C, K)."""
    C = len(q)
    rows = [
        [
            (q[i] * k[j] * g[j + 1 : i + 1].sum(0).exp()).sum() if j <= i else q.new_zeros(())
            for j in range(C)
        ]
        for i in range(C)
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("decay", [0.1, 5.0, 300.0])
def test_scores_and_gradients_of_channel_decay(decay, dtype):
    torch.manual_seed(0)
    q, k, g = torch.randn(3, 7, 5, dtype=dtype)
    g = -decay * g.abs()
    g[3:5] *= 1e-3  # weak after strong decay: small differences of large sums
    inputs = [x.clone().requires_grad_() for x in (q, k, g)]
    q, k, g = inputs
    got = ChannelDecay.of(g[None, None], dtype).scores(*(x[None, None] for x in (k, q, k)))
    got = torch.cat(got)[:, 0]
    want = torch.stack([scores_by_pairs(q, k, g), scores_by_pairs(k, k, g)])
    weight = torch.randn(2, 7, 7, dtype=dtype)
    got = [got, *torch.autograd.grad((got * weight).sum(), inputs)]
    want = [want, *torch.autograd.grad((want * weight).sum(), inputs)]
    for name, a, b in zip(("scores", "dq", "dk", "dg"), got, want, strict=True):
        assert_same(a, b, BY_DTYPE[dtype], name)


def test_channel_decay_of_whole_spans():
    torch.manual_seed(0)
    g = -torch.rand(2, 3, 6, 4, dtype=torch.float64)
    decay = ChannelDecay.of(g, torch.float64)
    for i in range(6):
        assert_same(decay.from_start[:, :, i], g[:, :, : i + 1].sum(2).exp(), FP64)
        assert_same(decay.to_end[:, :, i], g[:, :, i + 1 :].sum(2).exp(), FP64)
    assert_same(decay.whole[..., 0], g.sum(2).exp(), FP64)
