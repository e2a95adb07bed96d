"""HGRN2 against the definition in https://arxiv.org/abs/2404.07904."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.mixers.hgrn2 import HGRN2, HGRN2Args, forget_gate
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.errors import UserError
from tests.tolerances import FP32, assert_same


def make(**hgrn2) -> HGRN2:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(dim=16, n_heads=2, norm_eps=1e-3, hgrn2=HGRN2Args(**hgrn2))
    layer = HGRN2(args, args.hgrn2)
    layer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer.double()


def definition(layer: HGRN2, x_TD: Tensor, lower_bound: float) -> Tensor:
    """Compute h_t = Diag(f_t) h_{t-1} + (1 - f_t) outer i_t, y_t = h_t^T o_t, per head."""
    f_TC = lower_bound + (1 - lower_bound) * torch.sigmoid(x_TD @ layer.wf.weight.T)
    q_TC, i_TC = F.silu(x_TD @ layer.wq.weight.T), x_TD @ layer.wv.weight.T
    heads = []
    for f, q, i in zip(*(y.chunk(layer.n_heads, dim=-1) for y in (f_TC, q_TC, i_TC)), strict=True):
        S = f.new_zeros(layer.key_dim, layer.value_dim)
        outputs = []
        for t in range(len(x_TD)):
            S = torch.diag(f[t]) @ S + torch.outer(1 - f[t], i[t])
            outputs.append(S.T @ q[t] * layer.key_dim**-0.5)
        heads.append(torch.stack(outputs))
    y = torch.cat(heads, -1)
    return F.rms_norm(y, y.shape[-1:], layer.norm.weight, eps=1e-3) @ layer.wo.weight.T


@pytest.mark.parametrize(
    "hgrn2, shape",
    [
        ({}, (2, 8, 8)),
        ({"lower_bound": 0.8}, (2, 8, 8)),
        ({"n_heads": 4, "head_dim": 6, "expand_v": 0.5}, (4, 6, 3)),
    ],
)
def test_layer_equals_the_papers_definition(hgrn2, shape):
    layer, x = make(**hgrn2), torch.randn(1, 70, 16, dtype=torch.double)
    assert (layer.n_heads, layer.key_dim, layer.value_dim) == shape
    want = definition(layer, x[0], hgrn2.get("lower_bound", 0.0))
    assert_same(layer(x)[0], want, FP32)  # gates and the norm are computed in fp32


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
