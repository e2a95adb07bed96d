"""Retention against the definition in https://arxiv.org/abs/2307.08621."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.retnet import RetNet, RetNetArgs, log_decays
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.errors import UserError
from tests.tolerances import FP32, FP64, assert_same


def make(**retnet) -> RetNet:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(
        dim=16, n_heads=2, norm_eps=1e-3, rope_theta=500.0, retnet=RetNetArgs(**retnet)
    )
    layer = RetNet(args, args.retnet)
    layer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer.double()


def rotated(x_TK: Tensor) -> Tensor:
    """Compute equation 4: the pairs of x_t as complex numbers, times exp(i t theta)."""
    T, K = x_TK.shape
    theta = 500.0 ** (-torch.arange(0, K, 2, dtype=x_TK.dtype) / K)
    phase = torch.polar(torch.ones(T, K // 2, dtype=x_TK.dtype), torch.arange(T)[:, None] * theta)
    pairs = torch.view_as_complex(x_TK.reshape(T, K // 2, 2).contiguous())
    return torch.view_as_real(pairs * phase).flatten(1)


def definition(layer: RetNet, x_TD: Tensor) -> Tensor:
    """Compute the parallel form, equation 5, per head, and equation 8 with an RMSNorm."""
    T = len(x_TD)
    age = torch.arange(T)[:, None] - torch.arange(T)
    q, k, v, gate = (
        (x_TD @ w.weight.T).chunk(layer.n_heads, dim=-1)
        for w in (layer.wq, layer.wk, layer.wv, layer.wg)
    )
    heads = []
    for h in range(layer.n_heads):
        gamma = 1 - 2.0 ** (-5 - h)
        D_TT = torch.where(age >= 0, gamma ** age.double(), 0)
        scores = rotated(q[h]) @ rotated(k[h]).T * layer.key_dim**-0.5
        o = F.rms_norm((scores * D_TT) @ v[h], (layer.value_dim,), layer.norm.weight, eps=1e-3)
        heads.append(F.silu(gate[h]) * o)
    return torch.cat(heads, -1) @ layer.wo.weight.T


@pytest.mark.parametrize(
    "retnet, shape",
    [({}, (2, 8, 16)), ({"n_heads": 3, "head_dim": 4, "expand_v": 1.5}, (3, 4, 6))],
)
def test_layer_equals_the_papers_definition(retnet, shape):
    layer, x = make(**retnet), torch.randn(1, 70, 16, dtype=torch.double)
    assert (layer.n_heads, layer.key_dim, layer.value_dim) == shape
    # Angles, decays and the norm are computed in fp32.
    assert_same(layer(x)[0], definition(layer, x[0]), FP32)


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
