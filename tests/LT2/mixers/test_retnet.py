"""Retention against the definition in https://arxiv.org/abs/2307.08621."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.retnet import RetNet, RetNetArgs, log_decays
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.errors import UserError
from tests.LT2.mixers.paper import Weights, head_shape, linear, rms_norm, rotated
from tests.tolerances import FP32, FP64, assert_same


def make(**retnet) -> RetNet:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(
        dim=16, n_heads=2, mixer_norm_eps=1e-3, rope_theta=500.0, retnet=RetNetArgs(**retnet)
    )
    layer = RetNet(args, args.retnet)
    layer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer.double()


def definition(weights: Weights, args, x_TD: Tensor, window: int | None = None) -> Tensor:
    """Compute the parallel form, equation 5, per head, and equation 8 with an RMSNorm."""
    T, (n_heads, key_dim, _) = len(x_TD), head_shape(args, args.retnet)
    age = torch.arange(T)[:, None] - torch.arange(T)
    q, k, v, gate = (linear(weights, f"w{name}", x_TD, n_heads) for name in "qkvg")
    heads = []
    for h in range(n_heads):
        gamma = 1 - 2.0 ** (-5 - h)
        D_TT = torch.where(age >= 0, gamma ** age.type_as(x_TD), 0)
        scores = rotated(q[h], args.rope_theta) @ rotated(k[h], args.rope_theta).T
        o = (scores * key_dim**-0.5 * D_TT) @ v[h]
        heads.append(F.silu(gate[h]) * rms_norm(weights, "norm", o, args.mixer_norm_eps))
    return torch.cat(heads, -1) @ weights["wo.weight"].T


def test_log_decays_are_accurate():
    """1 - 2^-25 rounds to 1 in fp32; its logarithm doesn't round to 0."""
    want = (1 - 2.0 ** (-5 - torch.arange(24, dtype=torch.double))).log()
    got = log_decays(24, torch.device("cpu"))
    for h in range(24):
        assert got[h].item() == pytest.approx(want[h].item(), rel=1e-6), h
    assert_same(got[:4].double(), want[:4], FP32)


def test_scores_depend_on_distance_only():
    """Positions are relative."""
    layer = make()
    streams = torch.randn(1, 5, 2 * 16 + 32, dtype=torch.double)
    scores = []
    for start in (0, 64):
        q, k, *_ = layer.inputs(streams, (), torch.arange(5) + start)
        scores.append(torch.einsum("bthk,bshk->bhts", q, k))
    assert_same(scores[0], scores[1], FP32)
    assert scores[0].norm() > FP64


def test_an_odd_head_dim_is_a_user_error():
    with pytest.raises(UserError, match="model.retnet.head_dim=5"):
        make(head_dim=5)
