"""Packed rows: documents one after the other, with their bounds in cu_seqlens.

The bounds are a tensor, for kernels, and often wanted as numbers on the host, too: `upload_bounds`
makes the tensor of numbers that the host has, and `host_bounds` then finds them without waiting.
"""

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


def upload(
    numbers: Sequence[int] | Sequence[float], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Numbers of the host as a tensor; nothing waits until it has arrived."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


# cu_seqlens -> (its version, its numbers)
_known_bounds = WeakIdKeyDictionary()


def upload_bounds(bounds: Sequence[int], device: torch.device | str) -> Tensor:
    """cu_seqlens (n_docs + 1,) int32 of bounds from 0 to T, which `host_bounds` knows from now."""
    cu_seqlens = upload(bounds, device, torch.int32)
    _known_bounds[cu_seqlens] = (_version(cu_seqlens), list(bounds))
    return cu_seqlens


def host_bounds(cu_seqlens: Tensor) -> list[int]:
    """The bounds as numbers. Those that came from elsewhere than `upload_bounds` are copied from
    the device once, which waits for it: layers and loops share them."""
    version, known = _version(cu_seqlens), _known_bounds.get(cu_seqlens)
    if known is None or version is None or known[0] != version:
        known = _known_bounds[cu_seqlens] = (version, cu_seqlens.tolist())
    return known[1]


def _version(tensor: Tensor) -> int | None:
    """None for inference tensors, which count no versions: nothing can be kept for them."""
    return None if tensor.is_inference() else tensor._version


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
