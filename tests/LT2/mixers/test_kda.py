"""Kimi Delta Attention against the definition in https://arxiv.org/abs/2510.26692."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.kda import KDAArgs, KimiDeltaAttention
from apps.LT2.transformer import LoopedTransformerArgs
from tests.LT2.mixers.paper import Weights, convolved_heads, head_shape, linear, rms_norm


def make(jitter: float = 0.3, **kda) -> KimiDeltaAttention:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(
        dim=16, n_heads=2, mixer_norm_eps=1e-3, vocab_size=8, kda=KDAArgs(**kda)
    )
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


def definition(weights: Weights, args, x_TD: Tensor, window: int | None = None) -> Tensor:
    own, shape = args.kda, head_shape(args, args.kda)
    beta_TH = (1 + own.allow_neg_eigval) * torch.sigmoid(x_TD @ weights["wb.weight"].T)
    (a_TR,), (gate_TR,) = linear(weights, "wa_down", x_TD), linear(weights, "wg_down", x_TD)
    a = (a_TR @ weights["wa_up.weight"].T + weights["dt_bias"]).chunk(shape[0], dim=-1)
    gate_TC = gate_TR @ weights["wg_up.weight"].T + weights["gate_bias"]
    gates = torch.sigmoid(gate_TC).chunk(shape[0], dim=-1)
    outputs = []
    for h, (q, k, v) in enumerate(convolved_heads(weights, x_TD, own, shape)):
        g = -weights["A_log"][h].exp() * F.softplus(a[h])
        o = head_outputs(q, k, v, g, beta_TH[:, h])
        outputs.append(rms_norm(weights, "norm", o, args.mixer_norm_eps) * gates[h])
    return torch.cat(outputs, -1) @ weights["wo.weight"].T


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
