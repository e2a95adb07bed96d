"""Documents packed into one row, and cu_seqlens: the offsets of their first tokens, 0 to T.

Kernels read cu_seqlens on the device; some code needs the numbers on the host. A tensor made by
`upload_cu_seqlens` keeps them there, so `host_cu_seqlens` returns them without a sync.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from apps.LT2.kernel.arguments import wide_dtype


def document_of_tokens(cu_seqlens: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Return (document, position in it) of each token, both (T,) int64.

    [0, 3, 5] -> [0, 0, 0, 1, 1], [0, 1, 2, 0, 1]. An empty document has no token.
    """
    starts = cu_seqlens.long()
    token = torch.arange(n_tokens, device=starts.device)
    # Search all of cu_seqlens: Inductor drops the offset of a slice such as cu_seqlens[1:]
    # (https://github.com/pytorch/pytorch/issues/182343).
    document = torch.searchsorted(starts, token, right=True) - 1
    return document, token - starts[document]


def local_positions(n_tokens: int, cu_seqlens: Tensor | None, device: torch.device | str) -> Tensor:
    """Return the position of each token in its document, (T,) int64."""
    if cu_seqlens is None:
        return torch.arange(n_tokens, device=device)
    return document_of_tokens(cu_seqlens, n_tokens)[1]


def upload(
    numbers: Sequence[int] | Sequence[float], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Copy numbers from the host to a tensor on `device`, without a sync."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


@cache
def constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers as an fp32 tensor on `device`, always the same one. A CUDA graph can read it.

    A graph would repeat the copy of `upload` from host memory that is long free.
    """
    return upload(numbers, device, torch.float32)


_on_host = WeakIdKeyDictionary()  # cu_seqlens -> (its version, its numbers)


def upload_cu_seqlens(offsets: Sequence[int], device: torch.device | str) -> Tensor:
    """Make cu_seqlens (n_docs + 1,) int32, whose numbers `host_cu_seqlens` knows."""
    cu_seqlens = upload(offsets, device, torch.int32)
    _on_host[cu_seqlens] = (_version(cu_seqlens), list(offsets))
    return cu_seqlens


def host_cu_seqlens(cu_seqlens: Tensor) -> list[int]:
    """Return cu_seqlens as numbers.

    Unknown or changed content is copied from the device once, with a sync; all layers and loops
    share the copy.
    """
    version, known = _version(cu_seqlens), _on_host.get(cu_seqlens)
    if known is None or version is None or known[0] != version:
        known = _on_host[cu_seqlens] = (version, cu_seqlens.tolist())
    return known[1]


def _version(tensor: Tensor) -> int | None:
    """Return the tensor's version, or None for inference tensors: they count no versions."""
    return None if tensor.is_inference() else tensor._version


def by_document(
    recurrence: Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    state_shape: tuple[int, ...],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run a naive `recurrence(inputs (B, T, ...), state (B, ...)) -> o, state` on each document.

    state (N, *state_shape) before the first token, zeros if None. Inputs are computed in fp32, or
    in fp64 if `dtype` is fp64. Returns o in `dtype` and the N final states in the computed dtype.
    """
    wide = wide_dtype(dtype)
    n_sequences = len(inputs[0]) if cu_seqlens is None else len(cu_seqlens) - 1
    zeros = torch.zeros(n_sequences, *state_shape, dtype=wide, device=inputs[0].device)
    states = zeros if state is None else state.to(wide)
    inputs = [x.to(wide) for x in inputs]
    if cu_seqlens is None:
        results = [recurrence(inputs, states)]
    else:
        results = [
            recurrence([x[:, start:end] for x in inputs], states[n : n + 1])
            for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist()))
        ]
    o = torch.cat([o for o, _ in results], dim=1)
    return o.to(dtype), torch.cat([s for _, s in results])
