"""Softmax attention of one query a row over its cache: a decode step.

Shapes: B rows, S slots of the cache, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.attention.decode_triton import launch

IMPLS = ("auto", "sdpa", "triton")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 256  # of a head: wider tiles do not fit in a multiprocessor


def decode_attention(
    q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, n_valid_B: Tensor, *, impl: str = "auto"
) -> Tensor:
    """One query a row over the first n_valid >= 1 slots of its cache; returns (B, H, K).

    The order of the slots does not matter: a ring buffer is passed as it lies in memory. `impl`:
    "auto" is the Triton kernel on CUDA, which reads the valid slots alone, and "sdpa" elsewhere,
    which reads all of them under a mask; either can be forced.
    """
    assert impl in IMPLS, f"impl must be one of {IMPLS}, got {impl!r}"
    if impl == "triton" or (impl == "auto" and _kernel_can(q_BHK, k_BSGK, v_BSGK)):
        return decode_attention_triton(q_BHK, k_BSGK, v_BSGK, n_valid_B)
    return _sdpa(q_BHK, k_BSGK, v_BSGK, n_valid_B)


def _sdpa(q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, n_valid_B: Tensor) -> Tensor:
    slots = torch.arange(k_BSGK.shape[1], device=q_BHK.device)
    visible = (slots < n_valid_B[:, None])[:, None, None]  # B 1 1 S
    out = F.scaled_dot_product_attention(
        q_BHK[:, :, None],
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=visible,
        enable_gqa=q_BHK.shape[1] != k_BSGK.shape[2],
    )
    return out[:, :, 0]


def _kernel_can(q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> bool:
    same = q_BHK.dtype == k_BSGK.dtype == v_BSGK.dtype and q_BHK.dtype in KERNEL_DTYPES
    return q_BHK.is_cuda and same and q_BHK.shape[-1] <= MAX_WIDTH


@torch.library.custom_op("lt2::decode_attention", mutates_args=())
def decode_attention_triton(q: Tensor, k: Tensor, v: Tensor, n_valid: Tensor) -> Tensor:
    """Same arguments and result as `decode_attention`; not differentiable."""
    assert _kernel_can(q, k, v), f"the kernel does not take {q.dtype}, {k.dtype} on {q.device}"
    with torch.cuda.device(q.device):
        return launch(q, k, v, n_valid)


@decode_attention_triton.register_fake
def _(q, k, v, n_valid):
    return q.new_empty(q.shape)
