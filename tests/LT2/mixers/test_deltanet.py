"""DeltaNet against the definition in https://arxiv.org/abs/2406.06484."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.deltanet import DeltaNet, DeltaNetArgs
from apps.LT2.transformer import LoopedTransformerArgs
from tests.LT2.mixers.paper import convolved_heads
from tests.tolerances import FP32, assert_same


def make(**deltanet) -> DeltaNet:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(
        dim=16, n_heads=2, norm_eps=1e-3, vocab_size=8, deltanet=DeltaNetArgs(**deltanet)
    )
    layer = DeltaNet(args, args.deltanet)
    layer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer.double()


def head_outputs(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, beta_T: Tensor) -> Tensor:
    """Compute section 2.2 of the paper, S as V x K."""
    S_VK = q_TK.new_zeros(v_TV.shape[1], k_TK.shape[1])
    eye, outputs = torch.eye(k_TK.shape[1], dtype=q_TK.dtype), []
    for q, k, v, beta in zip(q_TK, k_TK, v_TV, beta_T, strict=True):
        S_VK = S_VK @ (eye - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
        outputs.append(S_VK @ q * len(k) ** -0.5)
    return torch.stack(outputs)


def definition(layer: DeltaNet, x_TD: Tensor, beta_range: float) -> Tensor:
    beta_TH = beta_range * torch.sigmoid(x_TD @ layer.wb.weight.T)
    outputs = []
    for h, (q, k, v) in enumerate(convolved_heads(layer, x_TD)):
        o = head_outputs(q, k, v, beta_TH[:, h])
        outputs.append(F.rms_norm(o, (layer.value_dim,), layer.norm.weight, eps=1e-3))
    return torch.cat(outputs, -1) @ layer.wo.weight.T


@pytest.mark.parametrize(
    "deltanet, shape, beta_range",
    [
        ({}, (2, 8, 8), 1.0),  # K = V = dim / H
        ({"allow_neg_eigval": True}, (2, 8, 8), 2.0),
        ({"conv_size": 0}, (2, 8, 8), 1.0),
        ({"n_heads": 3, "head_dim": 4, "expand_v": 1.5, "conv_size": 2}, (3, 4, 6), 1.0),
    ],
)
def test_layer_equals_the_papers_definition(deltanet, shape, beta_range):
    layer, x = make(**deltanet), torch.randn(1, 70, 16, dtype=torch.double)
    assert (layer.n_heads, layer.key_dim, layer.value_dim) == shape
    # The epsilons of the unit vectors q and k differ slightly.
    assert_same(layer(x)[0], definition(layer, x[0], beta_range), 10 * FP32)
