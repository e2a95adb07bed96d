"""Short causal depthwise convolution with SiLU, before the recurrences.

    y_t = silu( bias + sum_j weight[:, j] x_{t - (k-1) + j} )     weight[:, -1] is for token t

In plain torch a sum of k shifted products. On CUDA Triton kernels compute whole sequences, forward
and backward, and decode steps.

Shapes: B batch, T tokens, N sequences, C channels, k kernel size (k-1 inputs in a state).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.documents import document_of_tokens, local_positions
from apps.LT2.kernel.short_conv import fused
from apps.LT2.kernel.short_conv.heads import unit_heads
from apps.LT2.kernel.short_conv.step import kernel_supports, short_conv_step_triton

ACTIVATIONS = ("silu", None)


def short_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """Convolve B sequences, or N documents packed into one row, each from its own past.

    state       (N, k-1, C)   the k-1 inputs before the first token, oldest first; zeros if None
    cu_seqlens  (N + 1,)      int32 offsets of packed documents; then B is 1. None: N is B
    Returns y (B, T, C) in x's dtype, summed in fp32.
    """
    _check(x_BTC, weight_CK, state, cu_seqlens, activation)
    T, k = x_BTC.shape[1], weight_CK.shape[1]
    if state is None and fused.kernel_supports(x_BTC):
        position_T = _positions(x_BTC, cu_seqlens)
        return fused.short_conv_fused(x_BTC, weight_CK, bias_C, position_T, activation == "silu")
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    weight_CK = weight_CK.to(dtype)
    if cu_seqlens is None:
        padded_BTC = _prepend(state, x_BTC, k)
        shifted = [padded_BTC[:, j : j + T] for j in range(k)]
    else:
        shifted = _shift_packed(x_BTC, state, cu_seqlens, k)
    y_BTC = shifted[-1].to(dtype) * weight_CK[:, -1]
    for j in range(k - 1):
        y_BTC = torch.addcmul(y_BTC, shifted[j].to(dtype), weight_CK[:, j])
    if bias_C is not None:
        y_BTC = y_BTC + bias_C.to(dtype)
    return _activate(y_BTC, activation).to(x_BTC.dtype)


def short_conv_unit_heads(
    x_BTC: Tensor,
    weight_CK: Tensor,
    n_heads: int,
    key_dim: int,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve with SiLU, and split into the heads of a delta rule.

    Returns q and k (B, T, n_heads, key_dim), divided by their norms, and v (B, T, n_heads, V), for
    the channels of q, k and v in order. On CUDA one kernel does this for q and k.
    """
    if fused.heads_supported(x_BTC, key_dim):
        position_T = _positions(x_BTC, cu_seqlens)
        return fused.conv_unit_heads(x_BTC, weight_CK, position_T, n_heads, key_dim)
    return unit_heads(short_conv(x_BTC, weight_CK, cu_seqlens=cu_seqlens), n_heads, key_dim)


def conv_state(
    x_BTC: Tensor, k: int, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Return the last k-1 inputs of every sequence, (N, k-1, C): the state for the next tokens."""
    _, T, C = x_BTC.shape
    if cu_seqlens is None:
        return _prepend(state, x_BTC, k)[:, T:]
    start_N1, end_N1 = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    source_NK = end_N1 + torch.arange(1 - k, 0, device=x_BTC.device)
    new_NKC = x_BTC[0][source_NK.clamp(min=0)]
    older_NK1 = (source_NK < start_N1)[..., None]  # a document shorter than k-1 keeps old inputs
    if state is None:
        return new_NKC.masked_fill(older_NK1, 0)
    kept_NK = (source_NK - start_N1 + k - 1).clamp(max=k - 2)
    kept_NKC = state.gather(1, kept_NK[..., None].expand(-1, -1, C)).to(x_BTC.dtype)
    return torch.where(older_NK1, kept_NKC, new_NKC)


@torch.no_grad()
def short_conv_step(
    x_BC: Tensor,
    weight_CK: Tensor,
    state_BKC: Tensor,
    bias_C: Tensor | None = None,
    *,
    activation: str | None = "silu",
) -> Tensor:
    """Convolve one token of every sequence and shift `state_BKC` (B, k-1, C) in place; (B, C)."""
    assert activation in ACTIVATIONS, f"activation must be one of {ACTIVATIONS}, got {activation!r}"
    if kernel_supports(x_BC, state_BKC):
        return short_conv_step_triton(x_BC, weight_CK, state_BKC, bias_C, activation == "silu")
    dtype = torch.promote_types(x_BC.dtype, torch.float32)
    window_BKC = torch.cat([state_BKC, x_BC[:, None]], dim=1)
    state_BKC.copy_(window_BKC[:, 1:])
    y_BC = (window_BKC.to(dtype) * weight_CK.mT.to(dtype)).sum(1)
    if bias_C is not None:
        y_BC = y_BC + bias_C.to(dtype)
    return _activate(y_BC, activation).to(x_BC.dtype)


def _positions(x_BTC: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """Return the position of each token in its document, (T,) int32, if documents are packed."""
    if cu_seqlens is None:
        return None
    return local_positions(x_BTC.shape[1], cu_seqlens, x_BTC.device).int()


def _prepend(state: Tensor | None, x_BTC: Tensor, k: int) -> Tensor:
    if state is None:
        return F.pad(x_BTC, (0, 0, k - 1, 0))
    return torch.cat([state.to(x_BTC.dtype), x_BTC], dim=1)


def _shift_packed(x_1TC: Tensor, state: Tensor | None, cu_seqlens: Tensor, k: int) -> list[Tensor]:
    """Shift x by k-1, .., 1, 0 tokens; before a document's start comes its state, or zeros."""
    T = x_1TC.shape[1]
    document_T, position_T = document_of_tokens(cu_seqlens, T)
    padded_1TC = _prepend(None, x_1TC, k)
    shifts = []
    for j in range(k - 1):
        shifted = padded_1TC[:, j : j + T]
        outside_T1 = (position_T < k - 1 - j)[:, None]
        if state is None:
            shifts.append(shifted.masked_fill(outside_T1, 0))
        else:
            past_TC = state[document_T, (position_T + j).clamp(max=k - 2)].to(x_1TC.dtype)
            shifts.append(torch.where(outside_T1, past_TC, shifted))
    return [*shifts, x_1TC]


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return F.silu(y) if activation == "silu" else y


def _check(
    x_BTC: Tensor,
    weight_CK: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> None:
    B, _, C = x_BTC.shape
    assert activation in ACTIVATIONS, f"activation must be one of {ACTIVATIONS}, got {activation!r}"
    assert weight_CK.shape[0] == C, f"weight of {weight_CK.shape[0]} channels, x of {C}"
    assert cu_seqlens is None or B == 1, f"cu_seqlens packs documents into one row, got B = {B}"
    if state is not None:
        want = (B if cu_seqlens is None else len(cu_seqlens) - 1, weight_CK.shape[1] - 1, C)
        assert state.shape == want, f"state must be {want}, got {tuple(state.shape)}"
