"""What the doors of the recurrences share: which implementation computes, and what they assert.

Shapes: B batch, T tokens, N sequences, H heads, K key and V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor


def choose_impl(impl: str, impls: Mapping[str, Callable], v_BTHV: Tensor) -> Callable:
    """The function called `impl`; "auto": fla's kernels for 16-bit CUDA tensors, else chunked."""
    if impl == "auto":
        impl = "fla" if v_BTHV.is_cuda and v_BTHV.dtype.itemsize == 2 else "chunked"
    assert impl in impls, f"impl must be auto or one of {list(impls)}, got {impl!r}"
    return impls[impl]


def check_arguments(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    by_head: Mapping[str, Tensor],
    by_channel: Mapping[str, Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    grouped: bool = False,
) -> None:
    """Assert shapes and dtypes. `by_head`: fp32 tensors (B, T, H) by name; `by_channel`: (B, T, H,
    K). `grouped`: heads of v may share those of q and k."""
    B, T, G, K = q_BTHK.shape
    H = v_BTHV.shape[2] if grouped else G
    assert T > 0, "no tokens"
    q, k, v = (tuple(x.shape) for x in (q_BTHK, k_BTHK, v_BTHV))
    assert k == q, f"k {k} is not shaped as q {q}"
    assert v[:3] == (B, T, H) and H % G == 0, f"v {v} does not go with q {q}"
    for tensors, want in ((by_head, (B, T, H)), (by_channel, (B, T, H, K))):
        for name, x in tensors.items():
            assert x.shape == want, f"{name} {tuple(x.shape)} is not {want}"
            assert x.dtype.itemsize >= 4, f"{name} must be fp32, got {x.dtype}"
    assert cu_seqlens is None or B == 1, f"cu_seqlens packs documents into one row, got B = {B}"
    if state is not None:
        want = (B if cu_seqlens is None else len(cu_seqlens) - 1, H, K, v[3])
        assert state.shape == want, f"state {tuple(state.shape)} is not {want}"
        assert state.dtype.itemsize >= 4, f"state must be fp32, got {state.dtype}"
