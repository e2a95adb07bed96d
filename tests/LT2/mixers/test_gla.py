"""GLA against the definition in https://arxiv.org/abs/2312.06635."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.gla import GatedLinearAttention, GLAArgs
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.errors import UserError
from tests.LT2.mixers.paper import Weights, head_shape, linear, rms_norm


def make(**gla) -> GatedLinearAttention:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(dim=16, n_heads=2, mixer_norm_eps=1e-3, gla=GLAArgs(**gla))
    layer = GatedLinearAttention(args, args.gla)
    layer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer.double()


def definition(weights: Weights, args, x_TD: Tensor, window: int | None = None) -> Tensor:
    """Compute S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t, alpha = sigmoid(.)^(1/16), per head."""
    n_heads, key_dim, value_dim = head_shape(args, args.gla, key_share=0.5)
    assert weights["wa_up.weight"].shape[1] == args.gla.gate_rank
    q, k, v, gate = (linear(weights, f"w{name}", x_TD, n_heads) for name in "qkvg")
    (a_TR,) = linear(weights, "wa_down", x_TD)
    alpha_TC = torch.sigmoid(a_TR @ weights["wa_up.weight"].T + weights["decay_bias"]) ** (1 / 16)
    heads = []
    for h, alpha in enumerate(alpha_TC.chunk(n_heads, dim=-1)):
        S, outputs = x_TD.new_zeros(key_dim, value_dim), []
        for t in range(len(x_TD)):
            S = alpha[t][:, None] * S + torch.outer(k[h][t], v[h][t])
            outputs.append(S.T @ q[h][t] * key_dim**-0.5)
        o = rms_norm(weights, "norm", torch.stack(outputs), args.mixer_norm_eps)
        heads.append(o * F.silu(gate[h]))
    return torch.cat(heads, -1) @ weights["wo.weight"].T


@pytest.mark.parametrize(
    "changes, match", [({"gate_rank": 0}, "gate_rank=0"), ({"n_heads": 5}, "head_dim")]
)
def test_wrong_settings_are_user_errors(changes, match):
    with pytest.raises(UserError, match=f"model.gla.{match}"):
        make(**changes)
