"""DeltaNet against the definition in https://arxiv.org/abs/2406.06484."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.LT2.mixers.paper import Weights, convolved_heads, head_shape, rms_norm


def head_outputs(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, beta_T: Tensor) -> Tensor:
    """Compute section 2.2 of the paper, S as V x K."""
    S_VK = q_TK.new_zeros(v_TV.shape[1], k_TK.shape[1])
    eye, outputs = torch.eye(k_TK.shape[1], dtype=q_TK.dtype), []
    for q, k, v, beta in zip(q_TK, k_TK, v_TV, beta_T, strict=True):
        S_VK = S_VK @ (eye - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
        outputs.append(S_VK @ q * len(k) ** -0.5)
    return torch.stack(outputs)


def definition(weights: Weights, args, x_TD: Tensor, window: int | None = None) -> Tensor:
    own, shape = args.deltanet, head_shape(args, args.deltanet)
    beta_TH = (1 + own.allow_neg_eigval) * torch.sigmoid(x_TD @ weights["wb.weight"].T)
    outputs = []
    for h, (q, k, v) in enumerate(convolved_heads(weights, x_TD, own, shape)):
        o = head_outputs(q, k, v, beta_TH[:, h])
        outputs.append(rms_norm(weights, "norm", o, args.mixer_norm_eps))
    return torch.cat(outputs, -1) @ weights["wo.weight"].T
