"""Variable-length flash attention of torch. Importing it takes a second: it imports the compiler."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from lingua.transformer import repeat_kv

HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on


def varlen_flash(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Attend within documents, or rows, and windows. Arguments as in `attention`."""
    B, T, H, _ = q.shape
    if not HAS_GQA:
        k, v = (repeat_kv(x, H // x.shape[2]) for x in (k, v))
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if k.shape[2] != H:
        options["enable_gqa"] = True
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (B + 1) * T, T, device=q.device, dtype=torch.int32)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    # The longest document: an upper bound is enough and needs no sync.
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T, **options)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (B, T))
