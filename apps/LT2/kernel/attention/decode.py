"""Softmax attention of one query per row over its cache: a decode step.

Shapes: B rows, S slots of the cache, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.attention.decode_triton import launch

IMPLS = ("auto", "sdpa", "triton")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256  # larger tiles do not fit in shared memory


def decode_attention(
    q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, n_valid_B: Tensor, *, impl: str = "auto"
) -> Tensor:
    """Attend with one query per row to the first n_valid >= 1 slots of its cache: (B, H, K).

    The order of slots does not matter, so a ring buffer needs no reordering. Logits are multiplied
    by K**-0.5. `impl`: "triton" reads valid slots only, on CUDA; "sdpa" reads all under a mask;
    "auto" is "triton" if it supports the tensors.
    """
    assert impl in IMPLS, f"impl must be one of {IMPLS}, got {impl!r}"
    if impl == "triton" or (impl == "auto" and _kernel_supports(q_BHK, k_BSGK, v_BSGK)):
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


def _kernel_supports(q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> bool:
    same = q_BHK.dtype == k_BSGK.dtype == v_BSGK.dtype and q_BHK.dtype in KERNEL_DTYPES
    return q_BHK.is_cuda and same and q_BHK.shape[-1] <= MAX_HEAD_DIM


@torch.library.custom_op("lt2::decode_attention", mutates_args=())
def decode_attention_triton(q: Tensor, k: Tensor, v: Tensor, n_valid: Tensor) -> Tensor:
    """Run `decode_attention` with the Triton kernel. Not differentiable."""
    assert _kernel_supports(q, k, v), f"unsupported: {q.dtype}, {k.dtype} on {q.device}"
    with torch.cuda.device_of(q):
        return launch(q, k, v, n_valid)


decode_attention_triton.register_fake(lambda q, *_: q.new_empty(q.shape))
