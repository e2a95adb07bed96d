"""Native sparse attention on fla's kernels: three custom operators, so a block compiles whole.

Compressed attention and selected attention have a registered backward; the choice of blocks has
none. Block means are plain torch, and the window branch is `kernel.attention`.

fla gets cu_seqlens without empty documents (`packed_tokens`). Shapes as in
`native_sparse_attention`; C blocks, n chosen blocks. q is multiplied by K**-0.5 in the kernels.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from apps.LT2.kernel.fla import check_fla_inputs, import_fla, packed_tokens
from apps.LT2.kernel.nsa.blocks import cut_blocks, mean_of_blocks
from lingua.errors import UserError

MIN_HEAD_DIM = 16  # of a tile that tensor cores multiply
# fla 0.6.0 splits wider values in the backward of compressed attention and then subtracts the
# softmax correction twice: wrong dq and dk.
MAX_HEAD_DIM = 128
NO_BACKWARD = "fla has no backward for queries that continue a cached past"


def sparse_branches_fla(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    block_size: int,
    n_blocks: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute compressed and selected attention, both (B, T, H, K), of 16-bit CUDA tensors."""
    _check_supported(q_BTHK, k_BSGK, v_BSGK, block_size, n_blocks)
    # Outside the operators, a compiler can fuse these copies with the producers.
    q, k, v = q_BTHK.contiguous(), k_BSGK.contiguous(), v_BSGK.contiguous()
    S = k.shape[1]
    blocks = cut_blocks(S, block_size, cu_seqlens, k.device)
    k_BCGK, v_BCGK = (mean_of_blocks(x, blocks, packed=cu_seqlens is not None) for x in (k, v))
    compressed, lse_BTH = _compressed(q, k_BCGK, v_BCGK, cu_seqlens, S, block_size)
    with torch.no_grad():
        chosen_BTGn = _choose(q, k_BCGK, lse_BTH, cu_seqlens, S, block_size, n_blocks)
    selected, _ = _selected(q, k, v, chosen_BTGn, cu_seqlens, S, block_size)
    return compressed, selected


def _check_supported(q: Tensor, k: Tensor, v: Tensor, block_size: int, n_blocks: int) -> None:
    check_fla_inputs("native_sparse_attention", q, k, v)
    group, head_dim = q.shape[2] // k.shape[2], q.shape[3]
    otherwise = "or use impl='blocked'"
    if group < 16 or not _is_power_of_2(group):
        raise UserError(
            f"nsa on CUDA needs 16, 32, 64, .. query heads for each key/value head, got {group} "
            f"({q.shape[2]} / {k.shape[2]}); change model.n_heads or model.n_kv_heads, {otherwise}"
        )
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise UserError(
            f"nsa on CUDA needs a head dim from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}; "
            f"change model.head_dim or model.n_heads, {otherwise}"
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
    """Round up to a power of two, as fla does with the choices of a query."""
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
    """Return o (B, T, H, K) and the fp32 log-sum-exp (B, T, H) of the scores.

    Both are zero for a query before the first complete block.
    """
    arguments = _forward_arguments(q, k_BCGK, v_BCGK, cu_seqlens, block_size)
    with torch.cuda.device_of(q):
        return _compression().parallel_nsa_compression_fwd(TK=n_keys, **arguments)


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
    """Return the gradients of q and of the means; zero for means that belong to no block."""
    arguments = _backward_arguments(q, k_BCGK, v_BCGK, o, lse, cu_seqlens, block_size, do)
    with torch.cuda.device_of(q):
        dq, dk, dv = _compression().parallel_nsa_compression_bwd(**arguments)
    if cu_seqlens is not None:  # the kernel does not write rows after the last block
        n_blocks = ((cu_seqlens.diff() + block_size - 1) // block_size).sum()
        unused = torch.arange(dk.shape[1], device=dk.device) >= n_blocks
        dk.masked_fill_(unused[:, None, None], 0)
        dv.masked_fill_(unused[:, None, None], 0)
    return dq, dk, dv


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
    """Choose the blocks of each query: (B, T, G, n) int32, counted from its document's first.

    n is a power of two; -1 fills unused slots.
    """
    offsets, _ = packed_tokens(cu_seqlens)
    with torch.cuda.device_of(q):
        chosen = _parallel().parallel_nsa_topk(
            q=q,
            k=k_BCGK,
            TK=n_keys,
            lse=lse,
            block_counts=n_blocks,
            block_size=block_size,
            scale=q.shape[-1] ** -0.5,
            cu_seqlens=offsets,
        )
    chosen[..., n_blocks:] = -1  # most important first
    return chosen


@torch.library.custom_op("lt2::nsa_selected", mutates_args=())
def _selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    cu_seqlens: Tensor | None,
    n_keys: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, K) and the fp32 log-sum-exp (B, T, H) of the scores."""
    arguments = _forward_arguments(q, k, v, cu_seqlens, block_size)
    with torch.cuda.device_of(q):
        return _parallel().parallel_nsa_fwd(
            block_indices=chosen, block_counts=chosen.shape[-1], **arguments
        )


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
    """Return the gradients of q, k and v."""
    arguments = _backward_arguments(q, k, v, o, lse, cu_seqlens, block_size, do)
    with torch.cuda.device_of(q):
        return _parallel().parallel_nsa_bwd(
            block_indices=chosen, block_counts=chosen.shape[-1], **arguments
        )


def _register(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Register shapes and gradients of forward(q, k, v, *others, n_keys, block_size) -> o, lse."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *others, n_keys, ctx.block_size = inputs
        ctx.has_past, ctx.n_others = q.shape[1] != n_keys, len(others)
        ctx.save_for_backward(q, k, v, *output, *others)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, do: Tensor, _: None) -> tuple[Tensor | None, ...]:
        assert not ctx.has_past, NO_BACKWARD
        none = (None,) * (ctx.n_others + 2)
        return *backward(*ctx.saved_tensors, ctx.block_size, do), *none

    forward.register_fake(
        lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32))
    )
    backward.register_fake(lambda *args: tuple(torch.empty_like(x) for x in args[:3]))
    forward.register_autograd(differentiate, setup_context=save)


_register(_compressed, _compressed_backward)
_register(_selected, _selected_backward)
_choose.register_fake(
    lambda q, k_BCGK, lse, cu_seqlens, n_keys, block_size, n_blocks: q.new_empty(
        *q.shape[:2], k_BCGK.shape[2], _slots(n_blocks), dtype=torch.int32
    )
)


def _forward_arguments(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, block_size: int
) -> dict[str, Any]:
    offsets, tokens = packed_tokens(cu_seqlens)
    packed = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "token_indices_q": tokens}
    scale = q.shape[-1] ** -0.5
    return {"q": q, "k": k, "v": v, "block_size": block_size, "scale": scale, **packed}


def _backward_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    do: Tensor,
) -> dict[str, Any]:
    offsets, tokens = packed_tokens(cu_seqlens)
    results = {"o": o, "lse": lse, "do": do.contiguous()}
    packed = {"cu_seqlens": offsets, "token_indices": tokens}
    scale = q.shape[-1] ** -0.5
    return {"q": q, "k": k, "v": v, "block_size": block_size, "scale": scale, **results, **packed}


def _parallel() -> ModuleType:
    return import_fla("fla.ops.nsa.parallel")


def _compression() -> ModuleType:
    return import_fla("fla.ops.nsa.compression")
