"""GLA against the definition in https://arxiv.org/abs/2312.06635."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.gla import GatedLinearAttention, GLAArgs
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.errors import UserError
from tests.tolerances import FP32, assert_same


def make(**gla) -> GatedLinearAttention:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(dim=16, n_heads=2, norm_eps=1e-3, gla=GLAArgs(**gla))
    layer = GatedLinearAttention(args, args.gla)
    layer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer.double()


def definition(layer: GatedLinearAttention, x_TD: Tensor) -> Tensor:
    """Compute S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t, alpha = sigmoid(.)^(1/16), per head."""
    low_rank = x_TD @ layer.wa_down.weight.T @ layer.wa_up.weight.T
    alpha = torch.sigmoid(low_rank + layer.decay_bias) ** (1 / 16)
    q, k, v, gate = (x_TD @ w.weight.T for w in (layer.wq, layer.wk, layer.wv, layer.wg))
    parts = (x.chunk(layer.n_heads, dim=-1) for x in (q, k, v, alpha, gate))
    heads = []
    for q, k, v, alpha, gate in zip(*parts, strict=True):
        S = q.new_zeros(layer.key_dim, layer.value_dim)
        outputs = []
        for t in range(len(x_TD)):
            S = alpha[t][:, None] * S + torch.outer(k[t], v[t])
            outputs.append(S.T @ q[t] * layer.key_dim**-0.5)
        o = F.rms_norm(torch.stack(outputs), (layer.value_dim,), layer.norm.weight, eps=1e-3)
        heads.append(o * F.silu(gate))
    return torch.cat(heads, -1) @ layer.wo.weight.T


@pytest.mark.parametrize(
    "gla, shape",
    [({}, (2, 4, 8)), ({"n_heads": 3, "head_dim": 6, "expand_v": 0.5, "gate_rank": 2}, (3, 6, 3))],
)
def test_layer_equals_the_papers_definition(gla, shape):
    layer, x = make(**gla), torch.randn(1, 70, 16, dtype=torch.double)
    assert (layer.n_heads, layer.key_dim, layer.value_dim) == shape
    assert_same(layer(x)[0], definition(layer, x[0]), FP32)  # gates and norm are computed in fp32


@pytest.mark.parametrize(
    "changes, match", [({"gate_rank": 0}, "gate_rank=0"), ({"n_heads": 5}, "head_dim")]
)
def test_wrong_settings_are_user_errors(changes, match):
    with pytest.raises(UserError, match=f"model.gla.{match}"):
        make(**changes)
