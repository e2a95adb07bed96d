"""Mamba-2 against the definition in https://arxiv.org/abs/2405.21060 and against transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.mamba2 import Mamba2, Mamba2Args
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.errors import UserError
from tests.LT2.mixers.paper import Weights, convolve
from tests.tolerances import FP32, assert_same


def make(**mamba2) -> Mamba2:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(dim=16, mixer_norm_eps=1e-3, mamba2=Mamba2Args(**mamba2))
    layer = Mamba2(args, args.mamba2)
    layer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def definition(weights: Weights, args, x_TD: Tensor, window: int | None = None) -> Tensor:
    own, inner = args.mamba2, int(args.mamba2.expand * args.dim)
    P, G, N = own.head_dim, own.n_groups, own.state_dim
    H, eps = inner // P, args.mixer_norm_eps
    projected = torch.cat([x_TD @ weights[f"w{name}.weight"].T for name in "xBC"], dim=-1)
    xBC = convolve(weights, projected, own.conv_size, bias=True)
    x, B, C = xBC.split([inner, G * N, G * N], dim=-1)
    dt_TH = F.softplus(x_TD @ weights["wdt.weight"].T + weights["dt_bias"])
    heads = []
    for h in range(H):
        group = slice(h // (H // G) * N, (h // (H // G) + 1) * N)
        S, outputs = x_TD.new_zeros(N, P), []
        for t in range(len(x_TD)):
            dt, x_P = dt_TH[t, h], x[t, h * P : (h + 1) * P]
            decay = torch.exp(-weights["A_log"][h].exp() * dt)
            S = decay * S + torch.outer(B[t, group], dt * x_P)
            outputs.append(S.T @ C[t, group] + weights["D"][h] * x_P)
        heads.append(torch.stack(outputs))
    gated = torch.cat(heads, -1) * F.silu(x_TD @ weights["wz.weight"].T)
    groups = [F.rms_norm(y, y.shape[-1:], eps=eps) for y in gated.chunk(G, dim=-1)]
    return (torch.cat(groups, -1) * weights["norm.weight"]) @ weights["wo.weight"].T


@pytest.mark.parametrize("n_groups", [1, 2])
def test_layer_equals_transformers(n_groups):
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    layer = make(head_dim=8, state_dim=12, n_groups=n_groups)
    config = modeling.Mamba2Config(
        hidden_size=16,
        num_heads=4,
        head_dim=8,
        state_size=12,
        n_groups=n_groups,
        expand=2,
        conv_kernel=4,
        chunk_size=16,
        layer_norm_epsilon=1e-3,
        num_hidden_layers=1,
    )
    other = modeling.Mamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        linears = (layer.wz, layer.wx, layer.wB, layer.wC, layer.wdt)
        other.in_proj.weight.copy_(torch.cat([linear.weight for linear in linears]))
        other.conv1d.weight.copy_(layer.conv.weight[:, None])
        other.conv1d.bias.copy_(layer.conv.bias)
        other.out_proj.weight.copy_(layer.wo.weight)
        other.norm.weight.copy_(layer.norm.weight)
        for name in ("A_log", "dt_bias", "D"):
            getattr(other, name).copy_(getattr(layer, name))
        x = torch.randn(2, 50, 16)
        assert_same(layer(x), other(x), FP32)


def test_parameters_are_initialized_as_in_the_papers_code():
    """A in (1, 16), D = 1, time steps log-uniform in (0.001, 0.1)."""
    layer = make(head_dim=1, expand=40.0)
    layer.reset_parameters(None, 1.0)
    A, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 1 <= A.min() < 1.2 and 15.8 < A.max() <= 16.001
    assert 0.99e-3 < dt.min() < 1.1e-3 and 0.09 < dt.max() < 0.101
    assert (layer.D == 1).all() and (layer.norm.weight == 1).all()


@pytest.mark.parametrize(
    "changes, match",
    [
        ({}, "model.mamba2.head_dim=64"),
        ({"head_dim": 5}, "model.mamba2.head_dim=5"),
        ({"head_dim": 0}, "model.mamba2.head_dim=0"),
        ({"head_dim": 8, "expand": 0.0}, r"model\.mamba2\.expand"),
        ({"head_dim": 8, "state_dim": 0}, "model.mamba2.state_dim=0"),
        ({"head_dim": 8, "n_groups": 3}, "model.mamba2.n_groups=3"),
        ({"head_dim": 8, "conv_size": 1}, "model.mamba2.conv_size=1"),
    ],
)
def test_wrong_settings_are_user_errors(changes, match):
    with pytest.raises(UserError, match=match):
        make(**changes)
