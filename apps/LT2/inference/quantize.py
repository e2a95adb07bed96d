"""8-bit weights for decoding: a decode step reads every weight once per loop, so half the bytes.

Each row of a weight matrix becomes integers from -127 to 127 times one fp32 number (symmetric, per
output channel). That covers the products of the decode step: inputs and output of full, window and
linear mixers, and the feed-forward network. Embedding, head, norms, residual gates, decays, and the
mixers nsa and dsa stay as they are. The matrices for prompts get the rounded values in their own
dtype, so that prompts and decode steps compute with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from apps.LT2.kernel.decode_linear import KERNEL_DTYPES, MAX_ROWS, supports_rows
from apps.LT2.kernel.decode_linear.triton import MAX_NORM_K
from apps.LT2.mixers import Mixer
from apps.LT2.transformer import LoopedTransformer
from lingua.errors import UserError
from lingua.transformer import FeedForward

WEIGHTS = ("auto", "int8")
MAX_INT8 = 127


def check_weights(weights: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError for an unknown kind of weights, or 8-bit ones that no kernel would read."""
    if weights not in WEIGHTS:
        raise UserError(f"weights={weights} must be one of {', '.join(WEIGHTS)}")
    if weights == "int8" and device.type != "cuda":
        raise UserError(
            f"weights=int8 needs a GPU: its kernels are faster than dtype=bf16 only there; on "
            f"{device.type} use weights=auto"
        )
    if weights == "int8" and dtype not in KERNEL_DTYPES:
        raise UserError("weights=int8 has no kernels for dtype=fp32; use dtype=bf16 or fp16")


def unread_int8(dim: int, batch_size: int, option: str) -> str | None:
    """Return a warning if steps of `batch_size` sequences don't read all 8-bit weights, or None.

    option: sets the number of sequences
    """
    if supports_rows(batch_size, dim, normed=True):
        return None
    some = " in the products after a norm" if batch_size <= MAX_ROWS else ""
    most = next((n for n in range(MAX_ROWS, 0, -1) if supports_rows(n, dim, normed=True)), 0)
    way = f"model.dim={dim} is above {MAX_NORM_K}"
    if most:
        way = f"at most {most} read 8-bit ones; lower {option}"
    return f"weights=int8: steps of {batch_size} sequences read 16-bit weights{some}: {way}"


@torch.no_grad()
def quantize_int8(model: LoopedTransformer) -> None:
    """Quantize the weights of decode steps, in place, after `fuse_projections`."""
    for linears in decode_products(model):
        first = linears[0]
        if any(linear.bias is not None for linear in linears):
            continue  # computed by the linears themselves
        matrix = first.get_buffer("fused_weight")
        wide = matrix.float()
        scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / MAX_INT8
        rounded = (wide / scale[:, None]).round().to(torch.int8)
        matrix.copy_(rounded.float() * scale[:, None])
        first.register_buffer("int8_weight", rounded, persistent=False)
        first.register_buffer("int8_scale", scale, persistent=False)


def is_int8(model: LoopedTransformer) -> bool:
    return any(name.endswith("int8_weight") for name, _ in model.named_buffers())


def decode_products(model: LoopedTransformer) -> Iterator[tuple[nn.Linear, ...]]:
    """Yield the linears of each product of `decode_linear`."""
    for module in model.modules():
        if isinstance(module, Mixer) and module.decode_linears():
            yield module.decode_linears()
            yield (module.wo,)
        elif isinstance(module, FeedForward):
            yield module.fused_linears()
            yield (module.w2,)
