"""Linears that read one input as one matrix product.

Their weights are separate parameters, each with its own name, initialization and shard. For
inference `join_weights` lays them out one after the other, so that one product reads them all: with
few tokens a product takes as long as reading its weights does, and some microseconds more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def join_weights(linears: Sequence[nn.Linear]) -> None:
    """Move the weights of bias-free linears, in place, into one matrix that `joint_linear` uses.

    They stay parameters: views of it, which follow what is written into them.
    """
    assert all(linear.bias is None for linear in linears), "a bias would not be added"
    joint = torch.cat([linear.weight for linear in linears])
    for linear, weight in zip(linears, joint.split(_widths(linears)), strict=True):
        linear.weight.data = weight
    linears[0].register_buffer("joint_weight", joint, persistent=False)


def joint_weight(linears: Sequence[nn.Linear]) -> Tensor | None:
    """(all outputs, inputs): the matrix that `join_weights` made of these linears, if it did."""
    joint = getattr(linears[0], "joint_weight", None)
    assert joint is None or joint.shape[0] == sum(_widths(linears)), "other linears were joined"
    return joint


def joint_linear(x: Tensor, linears: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """The output of each linear for x (..., inputs)."""
    weight = joint_weight(linears)
    if weight is None:
        return tuple(linear(x) for linear in linears)
    return F.linear(x, weight).split(_widths(linears), dim=-1)


def _widths(linears: Sequence[nn.Linear]) -> list[int]:
    return [linear.out_features for linear in linears]
