"""Native sparse attention on CUDA: fla's kernels as three custom operators.

Compressed attention, the choice of blocks and selected attention are an operator each; the first
and the last have their backward registered, and the means of blocks are plain torch of fixed
shapes. So a block of the model compiles whole. The window branch is none of fla's.

Packed documents reach fla without the empty ones: its table of tokens numbers documents by their
first tokens, so one without tokens would shift all after it.

Shapes as in `native_sparse_attention`; C blocks, n chosen blocks.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from apps.LT2.kernel.fla import (
    check_fla_inputs,
    import_fla,
    packed_tokens,
    take_tables_from_host,
)
from apps.LT2.kernel.nsa.blocks import cut_blocks, mean_of_blocks
from lingua.errors import UserError

MIN_WIDTH = 16  # of a tile that a tensor core multiplies
# fla 0.6.0 cuts wider values in two in the backward of compressed attention, and then takes the
# softmax's correction off twice: wrong dq and dk.
MAX_WIDTH = 128


def sparse_branches_fla(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    block_size: int,
    n_blocks: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compressed and selected attention, both (B, T, H, K), for 16-bit q, k, v on CUDA."""
    _check_supported(q_BTHK, k_BSGK, v_BSGK, block_size, n_blocks)
    # Made contiguous outside the operators, where a compiler can do it with the producer.
    q, k, v = q_BTHK.contiguous(), k_BSGK.contiguous(), v_BSGK.contiguous()
    S = k.shape[1]
    blocks = cut_blocks(S, block_size, cu_seqlens, k.device)
    k_BCGK, v_BCGK = (mean_of_blocks(x, blocks, packed=cu_seqlens is not None) for x in (k, v))
    compressed, lse_BTH = _compressed(q, k_BCGK, v_BCGK, cu_seqlens, S, block_size)
    with torch.no_grad():
        chosen_BTGn = _choose(q, k_BCGK, lse_BTH, cu_seqlens, S, block_size, n_blocks)
    selected, _ = _selected(q, k, v, chosen_BTGn, cu_seqlens, block_size)
    return compressed, selected


def _check_supported(q: Tensor, k: Tensor, v: Tensor, block_size: int, n_blocks: int) -> None:
    check_fla_inputs("native_sparse_attention", q, k, v)
    group, width = q.shape[2] // k.shape[2], q.shape[3]
    otherwise = "or use impl='blocked'"
    if group < 16 or not _is_power_of_2(group):
        raise UserError(
            f"nsa on CUDA needs 16, 32, 64, .. query heads for each key/value head, got {group} "
            f"({q.shape[2]} / {k.shape[2]}); change model.n_heads or model.n_kv_heads, {otherwise}"
        )
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        raise UserError(
            f"nsa on CUDA needs heads {MIN_WIDTH} to {MAX_WIDTH} wide, got {width}; change "
            f"model.head_dim or model.n_heads, {otherwise}"
        )
    if block_size < 16 or not _is_power_of_2(block_size):
        raise UserError(
            f"model.nsa.block_size={block_size}: nsa on CUDA needs a power of two of at least 16, "
            f"such as 64; {otherwise}"
        )
    if 2 * _slots(n_blocks) > block_size:
        raise UserError(
            f"model.nsa.n_blocks={n_blocks}: nsa on CUDA chooses among block_size={block_size} "
            f"blocks at a time, so at most {block_size // 2} of them; use fewer or larger blocks, "
            f"{otherwise}"
        )


def _is_power_of_2(n: int) -> bool:
    return n & (n - 1) == 0


def _slots(n_blocks: int) -> int:
    """Choices that fla keeps for a query: the next power of two."""
    return 1 << (n_blocks - 1).bit_length()


@torch.library.custom_op("lt2::nsa_compressed", mutates_args=())
def _compressed(
    q: Tensor,
    k_BCGK: Tensor,
    v_BCGK: Tensor,
    cu_seqlens: Tensor | None,
    n_keys: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """o (B, T, H, K), zero where no block is complete, and the log-sum-exp (B, T, H) of the scores,
    0 there; fp32."""
    bounds, tokens = packed_tokens(cu_seqlens)
    with torch.cuda.device(q.device):
        return _compression().parallel_nsa_compression_fwd(
            q=q,
            k=k_BCGK,
            v=v_BCGK,
            TK=n_keys,
            block_size=block_size,
            scale=_scale(q),
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            token_indices_q=tokens,
        )


@_compressed.register_fake
def _(q, k_BCGK, v_BCGK, cu_seqlens, n_keys, block_size):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("lt2::nsa_compressed_backward", mutates_args=())
def _compressed_backward(
    q: Tensor,
    k_BCGK: Tensor,
    v_BCGK: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    do: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and of the means; zero for rows of the means that are no block's."""
    bounds, tokens = packed_tokens(cu_seqlens)
    with torch.cuda.device(q.device):
        dq, dk, dv = _compression().parallel_nsa_compression_bwd(
            q=q,
            k=k_BCGK,
            v=v_BCGK,
            o=o,
            lse=lse,
            do=do.contiguous(),
            block_size=block_size,
            scale=_scale(q),
            cu_seqlens=bounds,
            token_indices=tokens,
        )
    if cu_seqlens is not None:  # the kernel leaves rows behind the last block as they were
        n_blocks = ((cu_seqlens.diff() + block_size - 1) // block_size).sum()
        unused = torch.arange(dk.shape[1], device=dk.device) >= n_blocks
        dk.masked_fill_(unused[:, None, None], 0)
        dv.masked_fill_(unused[:, None, None], 0)
    return dq, dk, dv


@_compressed_backward.register_fake
def _(q, k_BCGK, v_BCGK, o, lse, cu_seqlens, block_size, do):
    return torch.empty_like(q), torch.empty_like(k_BCGK), torch.empty_like(v_BCGK)


def _save_compressed(ctx, inputs, output) -> None:
    q, k_BCGK, v_BCGK, cu_seqlens, n_keys, ctx.block_size = inputs
    ctx.continues_a_past = q.shape[1] != n_keys
    ctx.save_for_backward(q, k_BCGK, v_BCGK, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _differentiate_compressed(ctx, do, _dlse):
    assert not ctx.continues_a_past, NO_BACKWARD
    *saved, cu_seqlens = ctx.saved_tensors
    return (*_compressed_backward(*saved, cu_seqlens, ctx.block_size, do), None, None, None)


_compressed.register_autograd(_differentiate_compressed, setup_context=_save_compressed)


@torch.library.custom_op("lt2::nsa_choose", mutates_args=())
def _choose(
    q: Tensor,
    k_BCGK: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    n_keys: int,
    block_size: int,
    n_blocks: int,
) -> Tensor:
    """Blocks that each query attends to, (B, T, G, n) int32 counted from its document's first; n is
    a power of two, and -1 fills what is left over."""
    bounds, _ = packed_tokens(cu_seqlens)
    with torch.cuda.device(q.device):
        chosen = _parallel().parallel_nsa_topk(
            q=q,
            k=k_BCGK,
            TK=n_keys,
            lse=lse,
            block_counts=n_blocks,
            block_size=block_size,
            scale=_scale(q),
            cu_seqlens=bounds,
        )
    chosen[..., n_blocks:] = -1  # most important first
    return chosen


@_choose.register_fake
def _(q, k_BCGK, lse, cu_seqlens, n_keys, block_size, n_blocks):
    shape = (*q.shape[:2], k_BCGK.shape[2], _slots(n_blocks))
    return q.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("lt2::nsa_selected", mutates_args=())
def _selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """o (B, T, H, K) and the log-sum-exp (B, T, H) of the scores in fp32."""
    bounds, tokens = packed_tokens(cu_seqlens)
    with torch.cuda.device(q.device):
        return _parallel().parallel_nsa_fwd(
            q=q,
            k=k,
            v=v,
            block_indices=chosen,
            block_counts=chosen.shape[-1],
            block_size=block_size,
            scale=_scale(q),
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            token_indices_q=tokens,
        )


@_selected.register_fake
def _(q, k, v, chosen, cu_seqlens, block_size):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("lt2::nsa_selected_backward", mutates_args=())
def _selected_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    chosen: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    do: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    bounds, tokens = packed_tokens(cu_seqlens)
    with torch.cuda.device(q.device):
        return _parallel().parallel_nsa_bwd(
            q=q,
            k=k,
            v=v,
            o=o,
            lse=lse,
            do=do.contiguous(),
            block_indices=chosen,
            block_counts=chosen.shape[-1],
            block_size=block_size,
            scale=_scale(q),
            cu_seqlens=bounds,
            token_indices=tokens,
        )


@_selected_backward.register_fake
def _(q, k, v, o, lse, chosen, cu_seqlens, block_size, do):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_selected(ctx, inputs, output) -> None:
    q, k, v, chosen, cu_seqlens, ctx.block_size = inputs
    ctx.save_for_backward(q, k, v, *output, chosen, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _differentiate_selected(ctx, do, _dlse):
    q, k, *rest = ctx.saved_tensors
    assert q.shape[1] == k.shape[1], NO_BACKWARD
    return (*_selected_backward(q, k, *rest, ctx.block_size, do), None, None, None)


_selected.register_autograd(_differentiate_selected, setup_context=_save_selected)

NO_BACKWARD = "fla has no backward for queries that continue a cached past"


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _parallel() -> Any:
    take_tables_from_host()
    return import_fla("fla.ops.nsa.parallel")


def _compression() -> ModuleType:
    return import_fla("fla.ops.nsa.compression")
