"""The blocked form as one custom operator, so the block around it compiles whole.

Forward holds the scores and probabilities, so it also computes the gradients of the loss for the
indexer's tensors. Backward multiplies them by the gradient of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.arguments import wide_dtype
from apps.LT2.kernel.dsa import blocked, plain
from apps.LT2.kernel.dsa.selection import Index, mask_bytes
from apps.LT2.kernel.dsa.triton import differentiate

MAX_HEAD_DIM = 256  # larger tiles do not fit in shared memory
MAX_HEADS = 65_535  # of all rows: the limit of a grid's second axis


def dsa_blocked(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    index: Index,
    *,
    top_k: int | None,
    cu_seqlens: Tensor | None = None,
    with_loss: bool = False,
    use_kernels: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run `dsa` in blocks of queries."""
    n_keys = k_BSGK.shape[1]
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTHK, k_BSGK, v_BSGK))
    o_BTHK, _, _, loss, *_ = _forward(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        *index,
        cu_seqlens,
        n_keys if top_k is None else min(top_k, n_keys),
        with_loss,
        trained,
        use_kernels,
    )
    return o_BTHK, loss / q_BTHK.shape[:2].numel() if with_loss else None


def kernels_support(q_BTHK: Tensor, k_BSGK: Tensor, index: Index) -> bool:
    """Return whether the Triton kernels support these tensors."""
    half = q_BTHK.is_cuda and q_BTHK.dtype.itemsize == 2
    one_dtype = q_BTHK.dtype == k_BSGK.dtype == index.q_BTJC.dtype == index.k_BSC.dtype
    small = max(q_BTHK.shape[3], index.k_BSC.shape[2]) <= MAX_HEAD_DIM
    few = q_BTHK.shape[0] * max(q_BTHK.shape[2], index.q_BTJC.shape[2]) <= MAX_HEADS
    return half and one_dtype and small and few and q_BTHK.shape[1] == k_BSGK.shape[1]


@torch.library.custom_op("lt2::dsa", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    cu_seqlens: Tensor | None,
    top_k: int,
    with_loss: bool,
    keep_selection: bool,
    use_kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return o, the kernels' log-sum-exp, the packed selection, the loss and its gradients.

    The loss is summed over queries; its gradients are for the indexer's q, k and w. Tensors that
    were not requested are empty.
    """
    index = Index(index_q, index_k, index_w)
    if use_kernels:
        with torch.cuda.device_of(q):
            out = blocked.forward_on_kernels(q, k, v, index, cu_seqlens, top_k, with_loss=with_loss)
    else:
        keep = {"with_loss": with_loss, "keep_selection": keep_selection}
        out = blocked.forward(q, k, v, index, cu_seqlens, top_k, **keep)
    empty = [x.new_empty(0) for x in (index_q, index_k, index_w)]
    dq, dk, dw = out.index_grads or empty
    return out.o_BTHK, out.lse_BHT, out.bits_BTX, out.loss, dq, dk, dw


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    iq: Tensor,
    ik: Tensor,
    iw: Tensor,
    cu_seqlens: Tensor | None,
    top_k: int,
    with_loss: bool,
    keep_selection: bool,
    use_kernels: bool,
) -> tuple[Tensor, ...]:
    B, T, H, _ = q.shape
    grads = [x.new_empty(x.shape if with_loss else 0) for x in (iq, ik, iw)]
    n_keys = k.shape[1]
    if use_kernels:
        bits = q.new_empty(B, T, mask_bytes(n_keys), dtype=torch.uint8)
    else:
        keep = keep_selection and top_k < n_keys
        bits = q.new_empty((B, T, (n_keys + 7) // 8) if keep else 0, dtype=torch.uint8)
    lse = q.new_empty((B, H, T) if use_kernels else 0, dtype=torch.float32)
    return q.new_empty(q.shape), lse, bits, q.new_empty((), dtype=wide_dtype(q.dtype)), *grads


@torch.library.custom_op("lt2::dsa_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bits: Tensor,
    cu_seqlens: Tensor | None,
    do: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    if lse.numel():
        with torch.cuda.device_of(q):
            return differentiate(q, k, v, bits, cu_seqlens, o, lse, do)
    return plain.backward(q, k, v, bits, cu_seqlens, do)


_backward.register_fake(lambda *args: tuple(x.new_empty(x.shape) for x in args[:3]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, _, _, cu_seqlens, _, ctx.with_loss, _, _ = inputs
    o, lse, bits, _, *index_grads = output
    ctx.save_for_backward(q, k, v, o, lse, bits, cu_seqlens, *index_grads)
    ctx.mark_non_differentiable(lse, bits, *index_grads)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, do: Tensor | None, _dlse: None, _dbits: None, dloss: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    *saved, dq, dk, dw = ctx.saved_tensors
    grads = (None,) * 3 if do is None else _backward(*saved, do)
    index_grads = (None,) * 3
    if ctx.with_loss and dloss is not None:
        index_grads = tuple(grad * dloss.to(grad.dtype) for grad in (dq, dk, dw))
    return *grads, *index_grads, *(None,) * 5


_forward.register_autograd(_differentiate, setup_context=_save)
