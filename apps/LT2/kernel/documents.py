"""Packed rows: documents one after the other, with their bounds in cu_seqlens."""

from __future__ import annotations

import torch
from torch import Tensor


def document_of_tokens(cu_seqlens: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """(document, position in it) of each token, both (T,) int64.

    [0, 3, 5] -> [0, 0, 0, 1, 1], [0, 1, 2, 0, 1]. An empty document has no token.
    """
    bounds = cu_seqlens.long()
    token = torch.arange(n_tokens, device=bounds.device)
    # All bounds, and not bounds[1:]: Inductor of torch 2.11 drops the offset of such a slice.
    document = torch.searchsorted(bounds, token, right=True) - 1
    return document, token - bounds[document]
