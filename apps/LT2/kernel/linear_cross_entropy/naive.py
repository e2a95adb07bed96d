"""Cross-entropy of a linear head with all logits in fp32: the definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lingua.transformer import cross_entropy


def naive_linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, ignore_index: int = -100
) -> Tensor:
    """Return the mean of -log softmax(hidden weight^T)[target] over targets != `ignore_index`.

    Zero, with zero gradients, if every target is ignored.
    """
    logits = F.linear(hidden_ND.float(), weight_VD.float())
    total = cross_entropy(logits, target_N, ignore_index=ignore_index, reduction="sum")
    return total / (target_N != ignore_index).sum().clamp(min=1)
