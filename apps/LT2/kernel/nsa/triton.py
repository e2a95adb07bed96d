"""Native sparse attention on our Triton kernels: two custom operators, so a block compiles whole.

Compressed attention also chooses the blocks that selected attention reads. Block means are plain
torch, and the window branch is `kernel.attention`. The kernels read tables of blocks on the device,
so packed documents need no sync.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.nsa.blocks import Blocks, cut_blocks, mean_of_blocks
from apps.LT2.kernel.nsa.triton_compressed import attend_means, differentiate_means
from apps.LT2.kernel.nsa.triton_selected import attend_chosen, differentiate_chosen
from lingua.errors import UserError

MAX_HEAD_DIM = 256  # larger tiles do not fit in shared memory

Tensors = tuple[Tensor, ...]


def kernels_support(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the kernels support the tensors' device and dtype."""
    return q.is_cuda and q.dtype.itemsize == 2 and q.dtype == k.dtype == v.dtype


def sparse_branches_triton(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    block_size: int,
    n_blocks: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return compressed and selected attention, both (B, T, H, K) in q's dtype."""
    T, S, K = q_BTHK.shape[1], k_BSGK.shape[1], k_BSGK.shape[3]
    if K > MAX_HEAD_DIM:
        raise UserError(
            f"nsa on CUDA needs a head dim of at most {MAX_HEAD_DIM}, got {K}; change "
            "model.head_dim or model.n_heads, or use impl='blocked'"
        )
    # Outside the operators, a compiler can fuse these copies with the producers.
    q, k, v = q_BTHK.contiguous(), k_BSGK.contiguous(), v_BSGK.contiguous()
    blocks = cut_blocks(S, block_size, cu_seqlens, k.device)
    k_BCGK, v_BCGK = (mean_of_blocks(x, blocks, packed=cu_seqlens is not None) for x in (k, v))
    first_T, own_T, seen_T = blocks_of_queries(blocks, T, S)
    compressed, _, chosen_BTGn = _compressed(q, k_BCGK, v_BCGK, first_T, own_T, seen_T, n_blocks)
    start_C, length_C = blocks.start_C.int(), blocks.length_C.int()
    selected, _ = _selected(q, k, v, chosen_BTGn, first_T, start_C, length_C, block_size)
    return compressed, selected


def blocks_of_queries(blocks: Blocks, n_queries: int, n_tokens: int) -> Tensors:
    """Return the numbers first, own and seen for each of the last queries, (T,) int32 each.

    first is the first block of its document, own its own, and seen the first after the complete
    ones: its own, or the next if the query is the last token of its own.
    """
    token_T = torch.arange(n_tokens - n_queries, n_tokens, device=blocks.of_token_S.device)
    first_T, own_T = blocks.first_S[token_T], blocks.of_token_S[token_T]
    ends_T = blocks.start_C[own_T] + blocks.size - 1 == token_T
    return first_T.int(), own_T.int(), (own_T + ends_T).int()


@torch.library.custom_op("lt2::nsa_compressed", mutates_args=())
def _compressed(
    q: Tensor,
    k_BCGK: Tensor,
    v_BCGK: Tensor,
    first_T: Tensor,
    own_T: Tensor,
    seen_T: Tensor,
    n_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `attend_means`."""
    with torch.cuda.device_of(q):
        return attend_means(q, k_BCGK, v_BCGK, first_T, own_T, seen_T, n_blocks)


@torch.library.custom_op("lt2::nsa_compressed_backward", mutates_args=())
def _compressed_backward(
    q: Tensor,
    k_BCGK: Tensor,
    v_BCGK: Tensor,
    o: Tensor,
    lse: Tensor,
    first_T: Tensor,
    seen_T: Tensor,
    do: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):
        return differentiate_means(q, k_BCGK, v_BCGK, o, lse, first_T, seen_T, do.contiguous())


@torch.library.custom_op("lt2::nsa_selected", mutates_args=())
def _selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    first_T: Tensor,
    start_C: Tensor,
    length_C: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Run `attend_chosen`. Only the backward reads the length of blocks."""
    with torch.cuda.device_of(q):
        return attend_chosen(q, k, v, chosen, first_T, start_C, block_size)


@torch.library.custom_op("lt2::nsa_selected_backward", mutates_args=())
def _selected_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    chosen: Tensor,
    first_T: Tensor,
    start_C: Tensor,
    length_C: Tensor,
    block_size: int,
    do: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    tables = (chosen, first_T, start_C, length_C)
    with torch.cuda.device_of(q):
        return differentiate_chosen(q, k, v, o, lse, *tables, block_size, do.contiguous())


def _fake_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


@_compressed.register_fake
def _(q: Tensor, k_BCGK: Tensor, *args: Any) -> Tensors:
    chosen = q.new_empty(*q.shape[:2], k_BCGK.shape[2], args[-1], dtype=torch.int32)
    return torch.empty_like(q), _fake_lse(q), chosen


_selected.register_fake(lambda q, *_: (torch.empty_like(q), _fake_lse(q)))
_compressed_backward.register_fake(lambda *args: tuple(torch.empty_like(x) for x in args[:3]))
_selected_backward.register_fake(lambda *args: tuple(torch.empty_like(x) for x in args[:3]))


def _save_compressed(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    q, k, v, first_T, _, seen_T, _ = inputs
    o, lse, chosen = output
    ctx.save_for_backward(q, k, v, o, lse, first_T, seen_T)
    ctx.mark_non_differentiable(lse, chosen)
    ctx.set_materialize_grads(False)


def _differentiate_compressed(ctx: Any, do: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *_compressed_backward(*ctx.saved_tensors, do), *(None,) * 4


def _save_selected(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    q, k, v, *tables, ctx.block_size = inputs
    ctx.save_for_backward(q, k, v, *output, *tables)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_selected(ctx: Any, do: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grads = _selected_backward(*ctx.saved_tensors, ctx.block_size, do)
    return *grads, *(None,) * 5


_compressed.register_autograd(_differentiate_compressed, setup_context=_save_compressed)
_selected.register_autograd(_differentiate_selected, setup_context=_save_selected)
