"""Gated DeltaNet against the definition in https://arxiv.org/abs/2412.06464."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.gdn import GatedDeltaNet, GatedDeltaNetArgs
from apps.LT2.mixers.parts import init_decay
from apps.LT2.transformer import LoopedTransformerArgs
from tests.LT2.mixers.paper import convolved_heads
from tests.tolerances import FP32, assert_same


def make(**gdn) -> GatedDeltaNet:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(
        dim=16, n_heads=2, norm_eps=1e-3, vocab_size=8, gdn=GatedDeltaNetArgs(**gdn)
    )
    layer = GatedDeltaNet(args, args.gdn)
    layer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer.double()


def head_outputs(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, g_T: Tensor, beta_T: Tensor) -> Tensor:
    """Compute equation 10 of the paper, S as V x K."""
    S_VK = q_TK.new_zeros(v_TV.shape[1], k_TK.shape[1])
    eye, outputs = torch.eye(k_TK.shape[1], dtype=q_TK.dtype), []
    for q, k, v, g, beta in zip(q_TK, k_TK, v_TV, g_T, beta_T, strict=True):
        S_VK = g.exp() * S_VK @ (eye - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
        outputs.append(S_VK @ q * len(k) ** -0.5)
    return torch.stack(outputs)


def definition(layer: GatedDeltaNet, x_TD: Tensor, beta_range: float) -> Tensor:
    g_TH = -layer.A_log.exp() * F.softplus(x_TD @ layer.wa.weight.T + layer.dt_bias)
    beta_TH = beta_range * torch.sigmoid(x_TD @ layer.wb.weight.T)
    gates = F.silu(x_TD @ layer.wg.weight.T).chunk(layer.n_heads, dim=-1)
    outputs = []
    for h, (q, k, v) in enumerate(convolved_heads(layer, x_TD)):
        o = head_outputs(q, k, v, g_TH[:, h], beta_TH[:, h])
        o = F.rms_norm(o, (layer.value_dim,), layer.norm.weight, eps=1e-3)
        outputs.append(o * gates[h])
    return torch.cat(outputs, -1) @ layer.wo.weight.T


@pytest.mark.parametrize(
    "gdn, shape, beta_range",
    [
        ({}, (2, 6, 12), 1.0),  # K = 0.75 dim / H, V = 2 K
        ({"allow_neg_eigval": True}, (2, 6, 12), 2.0),
        ({"conv_size": 0}, (2, 6, 12), 1.0),
        ({"n_heads": 3, "head_dim": 4, "expand_v": 1.5, "conv_size": 2}, (3, 4, 6), 1.0),
    ],
)
def test_layer_equals_the_papers_definition(gdn, shape, beta_range):
    layer, x = make(**gdn), torch.randn(1, 70, 16, dtype=torch.double)
    assert (layer.n_heads, layer.key_dim, layer.value_dim) == shape
    # The epsilons of the unit vectors q and k differ slightly.
    assert_same(layer(x)[0], definition(layer, x[0], beta_range), 10 * FP32)


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
