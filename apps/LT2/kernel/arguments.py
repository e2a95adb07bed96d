"""What the public functions of the recurrences share: checks, dtypes, and the choice of `impl`.

Shapes: B batch, T tokens, N sequences, H heads, K key and V value head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and softmax: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fla_supports(x: Tensor) -> bool:
    """Whether fla's kernels run on these tensors. `check_gpu_stack` checks that it is there."""
    return x.is_cuda and x.dtype.itemsize == 2


def choose_impl(impl: str, impls: Mapping[str, Callable], v_BTHV: Tensor) -> Callable:
    """Return the function for `impl`; "auto" is "fla" for 16-bit CUDA tensors, else "chunked"."""
    if impl == "auto":
        impl = "fla" if fla_supports(v_BTHV) else "chunked"
    assert impl in impls, f"impl must be auto or one of {list(impls)}, got {impl!r}"
    return impls[impl]


def check_arguments(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    by_head: Mapping[str, Tensor] | None = None,
    by_channel: Mapping[str, Tensor] | None = None,
    grouped: bool = False,
) -> None:
    """Assert shapes and dtypes.

    by_head     fp32 tensors (B, T, H) by name
    by_channel  fp32 tensors (B, T, H, K) by name
    grouped     q and k may have fewer heads than v
    """
    B, T, G, K = q_BTHK.shape
    H = v_BTHV.shape[2] if grouped else G
    assert T > 0, "no tokens"
    q, k, v = (tuple(x.shape) for x in (q_BTHK, k_BTHK, v_BTHV))
    assert k == q, f"k {k} must have the shape of q {q}"
    assert v[:3] == (B, T, H) and H % G == 0, f"v {v} does not match q {q}"
    for tensors, want in ((by_head, (B, T, H)), (by_channel, (B, T, H, K))):
        for name, x in (tensors or {}).items():
            assert x.shape == want, f"{name} must be {want}, got {tuple(x.shape)}"
            assert x.dtype.itemsize >= 4, f"{name} must be fp32, got {x.dtype}"
    assert cu_seqlens is None or B == 1, f"cu_seqlens packs documents into one row, got B = {B}"
    if state is not None:
        want = (B if cu_seqlens is None else len(cu_seqlens) - 1, H, K, v[3])
        assert state.shape == want, f"state must be {want}, got {tuple(state.shape)}"
        assert state.dtype.itemsize >= 4, f"state must be fp32, got {state.dtype}"
