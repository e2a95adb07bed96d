"""Causal softmax attention: the one door to SDPA, FlexAttention, flash attention and xformers.

    impl "auto"            the fastest that does what is asked for here
         "sdpa"            torch's fused attention; documents by a dense mask; no window
         "flex_attention"  compiled with a block mask on CUDA; windows and documents
         "fmha"            xformers (CUDA, bf16 or fp16); windows and documents
         "naive"           dense fp32 reference

`auto` on CUDA in half precision takes SDPA for plain causal attention and torch's variable-length
flash attention for windows and documents, where that knows the head's width. Anywhere else it takes
SDPA, with a dense mask for them.
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
# Of a head, what flash attention has kernels for; SDPA pads heads to it and varlen_attn does not.
FLASH_WIDTH_STEP, MAX_FLASH_WIDTH = 8, 256
VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on


def check_attention_impl(impl: str, *, windowed: bool) -> None:
    """Refuse, at build time, a backend that cannot do what the layers need."""
    if impl not in IMPLS:
        raise UserError(f"model.attn_impl={impl!r} is none of {', '.join(IMPLS)}")
    if impl == "sdpa" and windowed:
        raise UserError(
            "model.attn_impl=sdpa has no sliding window, and a layer asks for one; "
            "use auto, flex_attention or fmha"
        )


def check_attention_device(
    impl: str, *, device_type: str, dtype: torch.dtype, training: bool = False
) -> None:
    """Refuse, before any work, a backend that does not run on this device in this dtype."""
    if impl == "flex_attention" and training and device_type == "cpu":
        raise UserError(
            "model.attn_impl=flex_attention has no backward on CPU; train there with auto"
        )
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
    """Causal attention of T queries over their own T keys.

    q           (B, T, H, K)
    k, v        (B, T, Hkv, K), Hkv divides H
    window      keys a query sees, itself included; None = all of its past
    cu_seqlens  (n_docs + 1,) int32 with B = 1: documents do not see each other
    Returns (B, T, H, K) in q's dtype.
    """
    assert cu_seqlens is None or q_BTHK.shape[0] == 1, "cu_seqlens packs documents into one row"
    if window is not None and window >= q_BTHK.shape[1]:
        window = None  # it hides nothing, and the plain path is faster
    args = (q_BTHK, k_BTHK, v_BTHK, window, cu_seqlens)
    if impl == "auto":
        plain = window is None and cu_seqlens is None
        return _sdpa(*args) if plain or not _varlen_flash_can(q_BTHK) else _varlen_flash(*args)
    if impl == "sdpa":
        return _sdpa(*args)
    if impl == "flex_attention":
        return _flex(*args)
    if impl == "fmha":
        return _fmha(*args)
    assert impl == "naive", f"unknown impl {impl!r}"
    return naive_attention(q_BTHK, k_BTHK, v_BTHK, window=window, cu_seqlens=cu_seqlens)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    plain = window is None and cu_seqlens is None
    mask = (
        None
        if plain
        else visible_keys(q.shape[1], window=window, cu_seqlens=cu_seqlens, device=q.device)
    )
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=plain,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _row_boundaries(q: Tensor) -> Tensor:
    """cu_seqlens of a batch whose rows are laid one after the other."""
    batch, length = q.shape[:2]
    return torch.arange(0, (batch + 1) * length, length, device=q.device, dtype=torch.int32)


def _varlen_flash_can(q: Tensor) -> bool:
    width = q.shape[-1]
    fits = width % FLASH_WIDTH_STEP == 0 and width <= MAX_FLASH_WIDTH
    return q.is_cuda and q.dtype in HALF and fits


def _varlen_flash(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None
) -> Tensor:
    if not VARLEN_HAS_GQA:
        groups = q.shape[2] // k.shape[2]
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if q.shape[2] != k.shape[2]:
        options["enable_gqa"] = True
    boundaries = _row_boundaries(q) if cu_seqlens is None else cu_seqlens
    longest = q.shape[1]  # an upper bound is enough, and needs no copy from the device
    out = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        boundaries,
        boundaries,
        longest,
        longest,
        **options,
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, q.shape[:2])


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    n_tokens = q.shape[1]
    document = None
    if cu_seqlens is not None:
        document, _ = document_of_tokens(cu_seqlens, n_tokens)

    def visible(b: Any, h: Any, t: Any, s: Any) -> Any:
        keep = t >= s
        if window is not None:
            keep = keep & (t - s < window)
        if document is not None:
            keep = keep & (document[t] == document[s])
        return keep

    mask = create_block_mask(visible, None, None, n_tokens, n_tokens, device=str(q.device))
    out = flex_attention_on(q.device.type)(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _fmha(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    fmha = _import_fmha()
    groups = q.shape[2] // k.shape[2]
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    bias = fmha.attn_bias
    if cu_seqlens is not None:
        lengths = [end - start for start, end in itertools.pairwise(host_cu_seqlens(cu_seqlens))]
        mask = bias.BlockDiagonalCausalMask.from_seqlens(lengths)
        if window is not None:
            mask = mask.make_local_attention(window)
    elif window is not None:
        # LocalAttentionFromBottomRightMask counts the keys left of the query.
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
    """xformers' wheels link to libcudart.so.12; beside a CUDA 13 torch nothing else loads it."""
    import ctypes
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        library = Path(root) / "cuda_runtime" / "lib" / "libcudart.so.12"
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return
