"""Gated DeltaNet against the definition in https://arxiv.org/abs/2412.06464."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.gdn import GatedDeltaNet, GatedDeltaNetArgs
from apps.LT2.mixers.parts import init_decay
from apps.LT2.transformer import LoopedTransformerArgs
from tests.LT2.mixers.paper import Weights, convolved_heads, head_shape, linear, rms_norm


def head_outputs(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, g_T: Tensor, beta_T: Tensor) -> Tensor:
    """Compute equation 10 of the paper, S as V x K."""
    S_VK = q_TK.new_zeros(v_TV.shape[1], k_TK.shape[1])
    eye, outputs = torch.eye(k_TK.shape[1], dtype=q_TK.dtype), []
    for q, k, v, g, beta in zip(q_TK, k_TK, v_TV, g_T, beta_T, strict=True):
        S_VK = g.exp() * S_VK @ (eye - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
        outputs.append(S_VK @ q * len(k) ** -0.5)
    return torch.stack(outputs)


def definition(weights: Weights, args, x_TD: Tensor, window: int | None = None) -> Tensor:
    own, shape = args.gdn, head_shape(args, args.gdn, key_share=0.75)
    a_TH = x_TD @ weights["wa.weight"].T + weights["dt_bias"]
    g_TH = -weights["A_log"].exp() * F.softplus(a_TH)
    beta_TH = (1 + own.allow_neg_eigval) * torch.sigmoid(x_TD @ weights["wb.weight"].T)
    gates = linear(weights, "wg", x_TD, shape[0])
    outputs = []
    for h, (q, k, v) in enumerate(convolved_heads(weights, x_TD, own, shape)):
        o = head_outputs(q, k, v, g_TH[:, h], beta_TH[:, h])
        outputs.append(rms_norm(weights, "norm", o, args.mixer_norm_eps) * F.silu(gates[h]))
    return torch.cat(outputs, -1) @ weights["wo.weight"].T


def test_decay_is_initialized_as_in_mamba2():
    """A in (0, 16), and time steps log-uniform in (0.001, 0.1)."""
    torch.manual_seed(0)
    A_log, dt_bias = torch.empty(2, 4000)
    init_decay(A_log, dt_bias)
    A, dt = A_log.exp(), F.softplus(dt_bias)
    assert 0 < A.min() < 0.1 and 15.9 < A.max() <= 16
    assert A.mean().item() == pytest.approx(8, rel=0.03)
    assert 0.99e-3 < dt.min() < 1.1e-3 and 0.09 < dt.max() < 0.101
    assert dt.log().mean().exp().item() == pytest.approx(1e-2, rel=0.05)


def test_the_output_norm_uses_norm_eps_by_default():
    """Runs that lack the option keep their results."""
    for options, eps in (({}, 1e-3), ({"mixer_norm_eps": 1e-4}, 1e-4)):
        args = LoopedTransformerArgs(dim=16, n_heads=2, norm_eps=1e-3, **options)
        assert GatedDeltaNet(args, GatedDeltaNetArgs()).norm.eps == eps
