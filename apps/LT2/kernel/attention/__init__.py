"""Causal softmax attention on SDPA, FlexAttention, flash attention or xformers.

    impl "auto"            the fastest that supports the request on this device
         "sdpa"            torch's fused attention; documents by a dense mask; no window
         "flex_attention"  compiled with a block mask on CUDA; windows and documents
         "fmha"            xformers (CUDA, bf16 or fp16); windows and documents
         "naive"           dense fp32 reference

"auto" on CUDA in half precision is SDPA for plain causal attention. For windows and documents it is
torch's variable-length flash attention if that supports the head dim. Everywhere else it is SDPA,
with a dense mask for windows and documents. All multiply the logits by K**-0.5.
"""

from __future__ import annotations

import inspect
import itertools
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from apps.LT2.kernel.attention.decode import decode_attention
from apps.LT2.kernel.attention.naive import naive_attention, visible_keys
from apps.LT2.kernel.documents import document_of_tokens, host_cu_seqlens
from lingua.errors import UserError
from lingua.transformer import flex_attention_on, repeat_kv

__all__ = [
    "attention",
    "check_attention_device",
    "check_attention_impl",
    "decode_attention",
    "naive_attention",
]

IMPLS = ("auto", "sdpa", "flex_attention", "fmha", "naive")
HALF = (torch.bfloat16, torch.float16)
# Head dims of flash attention. SDPA pads heads to a multiple, varlen_attn does not.
FLASH_HEAD_DIM_MULTIPLE, MAX_FLASH_HEAD_DIM = 8, 256
VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on


def check_attention_impl(impl: str, *, windowed: bool) -> None:
    """Raise UserError for an unknown backend, or one that lacks windows if layers need them."""
    if impl not in IMPLS:
        raise UserError(f"model.attn_impl={impl!r} must be one of {', '.join(IMPLS)}")
    if impl == "sdpa" and windowed:
        raise UserError(
            "model.attn_impl=sdpa does not support sliding windows, and a layer has one; "
            "use auto, flex_attention or fmha"
        )


def check_attention_device(
    impl: str, *, device_type: str, dtype: torch.dtype, training: bool = False
) -> None:
    """Raise UserError for a backend that does not run on this device in this dtype."""
    if impl == "flex_attention" and training and device_type == "cpu":
        raise UserError("model.attn_impl=flex_attention has no backward on CPU; use auto")
    if impl == "fmha":
        if device_type != "cuda" or dtype not in HALF:
            raise UserError(
                f"model.attn_impl=fmha runs on CUDA in bf16 or fp16, not on {device_type} in "
                f"{dtype}; use auto, or distributed.model_dtype=bf16 on a GPU"
            )
        _import_fmha()


def attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    *,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend causally with T queries to their own T keys.

    q           (B, T, H, K)
    k, v        (B, T, Hkv, K), Hkv divides H
    window      keys a query sees, itself included; None = all of its past
    cu_seqlens  (n_docs + 1,) int32 with B = 1: documents do not see each other
    Returns (B, T, H, K) in q's dtype. Logits are multiplied by K**-0.5.
    """
    assert cu_seqlens is None or q_BTHK.shape[0] == 1, "cu_seqlens packs documents into one row"
    if window is not None and window >= q_BTHK.shape[1]:
        window = None  # it hides nothing, and the plain path is faster
    args = (q_BTHK, k_BTHK, v_BTHK, window, cu_seqlens)
    if impl == "auto":
        plain = window is None and cu_seqlens is None
        return _sdpa(*args) if plain or not _varlen_flash_supports(q_BTHK) else _varlen_flash(*args)
    if impl == "sdpa":
        return _sdpa(*args)
    if impl == "flex_attention":
        return _flex(*args)
    if impl == "fmha":
        return _fmha(*args)
    assert impl == "naive", f"unknown impl {impl!r}"
    return naive_attention(q_BTHK, k_BTHK, v_BTHK, window=window, cu_seqlens=cu_seqlens)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    mask = None
    if window is not None or cu_seqlens is not None:
        mask = visible_keys(q.shape[1], window=window, cu_seqlens=cu_seqlens, device=q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa
    )
    return out.transpose(1, 2)


def _varlen_flash_supports(q: Tensor) -> bool:
    K = q.shape[-1]
    fits = K % FLASH_HEAD_DIM_MULTIPLE == 0 and K <= MAX_FLASH_HEAD_DIM
    return q.is_cuda and q.dtype in HALF and fits


def _varlen_flash(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None
) -> Tensor:
    B, T, H, _ = q.shape
    if not VARLEN_HAS_GQA:
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


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    T = q.shape[1]
    document = None if cu_seqlens is None else document_of_tokens(cu_seqlens, T)[0]

    def visible(b: Any, h: Any, t: Any, s: Any) -> Any:
        keep = t >= s
        if window is not None:
            keep = keep & (t - s < window)
        if document is not None:
            keep = keep & (document[t] == document[s])
        return keep

    mask = create_block_mask(visible, None, None, T, T, device=str(q.device))
    attend = flex_attention_on(q.device.type)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _fmha(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    fmha = _import_fmha()
    k, v = (repeat_kv(x, q.shape[2] // x.shape[2]) for x in (k, v))
    bias = fmha.attn_bias
    if cu_seqlens is not None:
        lengths = [end - start for start, end in itertools.pairwise(host_cu_seqlens(cu_seqlens))]
        mask = bias.BlockDiagonalCausalMask.from_seqlens(lengths)
        if window is not None:
            mask = mask.make_local_attention(window)
    elif window is not None:
        # window_left excludes the query itself.
        mask = bias.LocalAttentionFromBottomRightMask(window_left=window - 1, window_right=0)
    else:
        mask = bias.LowerTriangularMask()
    return fmha.memory_efficient_attention(q, k, v, attn_bias=mask)


@cache
def _import_fmha() -> Any:
    _preload_cuda12_runtime()
    try:
        from xformers.ops import fmha  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, AttributeError) as error:
        raise UserError(
            f"model.attn_impl=fmha needs xformers, which did not load ({error}); "
            "install it with `pip install -e '.[gpu]'` or use model.attn_impl=auto"
        ) from None
    return fmha


def _preload_cuda12_runtime() -> None:
    """Load libcudart.so.12: xformers 0.0.35 links to it, and a CUDA 13 torch does not load it."""
    import ctypes
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        library = Path(root) / "cuda_runtime" / "lib" / "libcudart.so.12"
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return
