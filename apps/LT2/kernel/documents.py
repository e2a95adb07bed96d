"""Packed rows: documents one after the other, with their bounds in cu_seqlens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


def document_of_tokens(cu_seqlens: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """(document, position in it) of each token, both (T,) int64.

    [0, 3, 5] -> [0, 0, 0, 1, 1], [0, 1, 2, 0, 1]. An empty document has no token.
    """
    bounds = cu_seqlens.long()
    token = torch.arange(n_tokens, device=bounds.device)
    # All bounds, and not bounds[1:]: Inductor of torch 2.11 drops the offset of such a slice.
    document = torch.searchsorted(bounds, token, right=True) - 1
    return document, token - bounds[document]


def local_positions(n_tokens: int, cu_seqlens: Tensor | None, device: torch.device | str) -> Tensor:
    """(T,) index of each token in its document."""
    if cu_seqlens is None:
        return torch.arange(n_tokens, device=device)
    return document_of_tokens(cu_seqlens, n_tokens)[1]


# cu_seqlens -> (its version, its numbers)
_known_bounds = WeakIdKeyDictionary()


def host_bounds(cu_seqlens: Tensor) -> list[int]:
    """The bounds as numbers. They are copied from the device once: layers and loops share them."""
    # Inference tensors count no versions, so nothing can be kept for them.
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    known = _known_bounds.get(cu_seqlens)
    if known is None or version is None or known[0] != version:
        known = _known_bounds[cu_seqlens] = (version, cu_seqlens.tolist())
    return known[1]


def by_document(
    recurrence: Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    state_shape: tuple[int, ...],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """A naive `recurrence(inputs (B, T, ...), state (B, ...)) -> o, state` on rows or on documents.

    state (N, *state_shape) before the first token, zeros if None. Computed in fp32, or in fp64
    where `dtype` is; o comes back in `dtype`, the states of the N sequences in what computed them.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n_sequences = len(inputs[0]) if cu_seqlens is None else len(cu_seqlens) - 1
    zeros = torch.zeros(n_sequences, *state_shape, dtype=wide, device=inputs[0].device)
    states = zeros if state is None else state.to(wide)
    inputs = [x.to(wide) for x in inputs]
    if cu_seqlens is None:
        results = [recurrence(inputs, states)]
    else:
        bounds = cu_seqlens.tolist()
        results = [
            recurrence([x[:, start:end] for x in inputs], states[n : n + 1])
            for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        ]
    o = torch.cat([o for o, _ in results], dim=1)
    return o.to(dtype), torch.cat([s for _, s in results])
