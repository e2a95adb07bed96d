"""Kimi Delta Attention against the definition in https://arxiv.org/abs/2510.26692."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.kda import KDAArgs, KimiDeltaAttention
from apps.LT2.transformer import LoopedTransformerArgs
from tests.LT2.mixers.paper import convolved_heads
from tests.tolerances import FP32, assert_same


def make(jitter: float = 0.3, **kda) -> KimiDeltaAttention:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(dim=16, n_heads=2, norm_eps=1e-3, vocab_size=8, kda=KDAArgs(**kda))
    layer = KimiDeltaAttention(args, args.kda)
    layer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for p in layer.parameters():
            p += jitter * torch.randn_like(p)
    return layer.double()


def head_outputs(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, g_TK: Tensor, beta_T: Tensor) -> Tensor:
    """Compute equation 1 of the paper, S as K x V."""
    S_KV = q_TK.new_zeros(k_TK.shape[1], v_TV.shape[1])
    eye, outputs = torch.eye(k_TK.shape[1], dtype=q_TK.dtype), []
    for q, k, v, g, beta in zip(q_TK, k_TK, v_TV, g_TK, beta_T, strict=True):
        fade = (eye - beta * torch.outer(k, k)) @ torch.diag(g.exp())
        S_KV = fade @ S_KV + beta * torch.outer(k, v)
        outputs.append(S_KV.T @ q * len(k) ** -0.5)
    return torch.stack(outputs)


def definition(layer: KimiDeltaAttention, x_TD: Tensor, beta_range: float) -> Tensor:
    beta_TH = beta_range * torch.sigmoid(x_TD @ layer.wb.weight.T)
    a_TC = x_TD @ layer.wa_down.weight.T @ layer.wa_up.weight.T + layer.dt_bias
    gate_TC = torch.sigmoid(x_TD @ layer.wg_down.weight.T @ layer.wg_up.weight.T + layer.gate_bias)
    a, gates = a_TC.chunk(layer.n_heads, dim=-1), gate_TC.chunk(layer.n_heads, dim=-1)
    outputs = []
    for h, (q, k, v) in enumerate(convolved_heads(layer, x_TD)):
        g = -layer.A_log[h].exp() * F.softplus(a[h])
        o = head_outputs(q, k, v, g, beta_TH[:, h])
        o = F.rms_norm(o, (layer.value_dim,), layer.norm.weight, eps=1e-3)
        outputs.append(o * gates[h])
    return torch.cat(outputs, -1) @ layer.wo.weight.T


@pytest.mark.parametrize(
    "kda, shape, beta_range",
    [
        ({}, (2, 8, 8), 1.0),  # K = V = dim / H
        ({"allow_neg_eigval": True}, (2, 8, 8), 2.0),
        ({"conv_size": 0}, (2, 8, 8), 1.0),
        ({"n_heads": 3, "head_dim": 4, "expand_v": 1.5, "conv_size": 2}, (3, 4, 6), 1.0),
    ],
)
def test_layer_equals_the_papers_definition(kda, shape, beta_range):
    layer, x = make(**kda), torch.randn(1, 70, 16, dtype=torch.double)
    assert (layer.n_heads, layer.key_dim, layer.value_dim) == shape
    # The epsilons of the unit vectors q and k differ slightly.
    assert_same(layer(x)[0], definition(layer, x[0], beta_range), 10 * FP32)


def test_the_rank_of_projections_is_the_value_dim():
    layer = make(head_dim=4, expand_v=1.5)
    assert layer.wa_down.weight.shape == layer.wg_down.weight.shape == (6, 16)
    assert layer.wa_up.weight.shape == (2 * 4, 6) and layer.wg_up.weight.shape == (2 * 6, 6)


def test_decay_and_gate_are_initialized_as_in_the_paper():
    """A in (1, 16), time steps log-uniform in (0.001, 0.1), a gate without bias."""
    layer = make(jitter=0.0, n_heads=500, head_dim=4)
    A, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 1 <= A.min() < 1.2 and 15.8 < A.max() <= 16
    assert 0.99e-3 < dt.min() < 1.1e-3 and 0.09 < dt.max() < 0.101
    assert not layer.gate_bias.any()
