"""Softmax attention against its definition, and its output gate."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.LT2.mixer_cases import CASES, assert_same_fp32, make, tokens
from tests.LT2.mixers.paper import Weights, linear, softmax_heads


def definition(weights: Weights, args, x_TD: Tensor, window: int | None = None) -> Tensor:
    age = torch.arange(len(x_TD))[:, None] - torch.arange(len(x_TD))
    visible = (age >= 0) & (age < (window or len(x_TD)))
    heads = []
    for q, k, v in softmax_heads(weights, args, x_TD, args.n_kv_heads or args.n_heads):
        scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(~visible, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    o_TC = torch.cat(heads, dim=-1)
    if args.gated_attn:
        o_TC = o_TC * torch.sigmoid(x_TD @ weights["wg.weight"].T)
    return linear(weights, "wo", o_TC)[0]


def test_the_output_gate_starts_half_open():
    mixer = make(CASES["full_gqa_gated"], jitter=0.0)
    plain = make(CASES["full_gqa_gated"], jitter=0.0)
    plain.wg = None
    x = tokens(1, 9)
    assert_same_fp32(mixer(x), plain(x) / 2)
