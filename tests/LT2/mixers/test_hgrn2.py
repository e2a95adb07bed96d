"""HGRN2 against the definition in https://arxiv.org/abs/2404.07904."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.hgrn2 import HGRN2Args, forget_gate
from lingua.errors import UserError
from tests.LT2.mixers.paper import Weights, head_shape, linear, rms_norm


def definition(weights: Weights, args, x_TD: Tensor, window: int | None = None) -> Tensor:
    """Compute h_t = Diag(f_t) h_{t-1} + (1 - f_t) outer i_t, y_t = h_t^T o_t, per head."""
    n_heads, key_dim, value_dim = head_shape(args, args.hgrn2)
    bound = args.hgrn2.lower_bound
    q, i, f = (linear(weights, f"w{name}", x_TD, n_heads) for name in "qvf")
    heads = []
    for h in range(n_heads):
        S, outputs = x_TD.new_zeros(key_dim, value_dim), []
        f_TK = bound + (1 - bound) * torch.sigmoid(f[h])
        for t in range(len(x_TD)):
            S = torch.diag(f_TK[t]) @ S + torch.outer(1 - f_TK[t], i[h][t])
            outputs.append(S.T @ F.silu(q[h][t]) * key_dim**-0.5)
        heads.append(torch.stack(outputs))
    return (
        rms_norm(weights, "norm", torch.cat(heads, -1), args.mixer_norm_eps)
        @ weights["wo.weight"].T
    )


@pytest.mark.parametrize("lower_bound", [0.0, 0.25, 0.999])
def test_gate_and_complement_are_accurate(lower_bound):
    x = torch.tensor([-90.0, -30.0, -2.0, 0.0, 2.0, 30.0, 80.0])
    log_f, complement = forget_gate(x, lower_bound)
    open_part = (1 - lower_bound) * torch.sigmoid(-x.double())
    closed = lower_bound + (1 - lower_bound) * torch.sigmoid(x.double())
    want_log = torch.where(closed > 0.5, torch.log1p(-open_part), closed.log())
    for got, want in ((complement, open_part), (log_f, want_log)):
        for a, b in zip(got.tolist(), want.tolist(), strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-37)


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_lower_bound_out_of_range_is_a_user_error(value):
    with pytest.raises(UserError, match=f"model.hgrn2.lower_bound={value}"):
        HGRN2Args(lower_bound=value)
