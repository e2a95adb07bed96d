"""Native sparse attention in plain torch, QUERIES queries at a time.

Selected attention is dense attention under a mask: at the lengths of CPU training this is faster
than gathering keys for every query. Compressed scores are fp32 for all inputs. Shapes as in
`naive.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.nsa.blocks import (
    Blocks,
    choose_blocks,
    cut_blocks,
    mean_of_blocks,
    seen_complete,
    wide,
)

QUERIES = 128  # at a time


def sparse_branches_blocked(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    block_size: int,
    n_blocks: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return compressed and selected attention, both (B, T, H, K) in q's dtype."""
    T, S, G = q_BTHK.shape[1], k_BSGK.shape[1], k_BSGK.shape[2]
    blocks = cut_blocks(S, block_size, cu_seqlens, q_BTHK.device)
    k_BCGK, v_BCGK = (
        mean_of_blocks(x, blocks, packed=cu_seqlens is not None) for x in (k_BSGK, v_BSGK)
    )
    q_BTGRK = q_BTHK.unflatten(2, (G, -1))
    pieces = []
    for start in range(0, T, QUERIES):
        q = q_BTGRK[:, start : start + QUERIES]
        end = S - T + start + q.shape[1]
        token_T = torch.arange(end - q.shape[1], end, device=q.device)
        compressed, importance = compressed_attention(q, k_BCGK, v_BCGK, blocks, token_T)
        chosen = choose_blocks(
            importance.detach(),
            blocks.first_S[token_T][:, None, None],
            blocks.of_token_S[token_T][:, None, None],
            n_blocks,
        )
        selected = selected_attention(q, k_BSGK[:, :end], v_BSGK[:, :end], blocks, token_T, chosen)
        pieces.append((compressed, selected))
    compressed, selected = (torch.cat(branch, dim=1) for branch in zip(*pieces, strict=True))
    return compressed.flatten(2, 3), selected.flatten(2, 3)


def compressed_attention(
    q_BTGRK: Tensor, k_BCGK: Tensor, v_BCGK: Tensor, blocks: Blocks, token_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend to the blocks complete at each query.

    Returns o (B, T, G, R, K), zero without such blocks, and the weights of blocks summed over R,
    (B, T, G, C).
    """
    weights_BGRTC = compressed_weights(
        q_BTGRK.permute(0, 2, 3, 1, 4),
        k_BCGK.transpose(1, 2)[:, :, None],
        seen_complete(blocks, token_T),
    )
    o_BGRTK = weights_BGRTC @ wide(v_BCGK).transpose(1, 2)[:, :, None]
    o_BTGRK = o_BGRTK.permute(0, 3, 1, 2, 4).type_as(q_BTGRK)
    return o_BTGRK, weights_BGRTC.sum(2).transpose(1, 2)


def compressed_weights(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) (..., T, C) over the seen blocks; zero without any."""
    scores = wide(q) @ wide(k).mT * q.shape[-1] ** -0.5
    # Finite, so that a row without seen blocks has no NaN gradient.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~seen, lowest).softmax(-1).masked_fill(~seen, 0)


def selected_attention(
    q_BTGRK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    blocks: Blocks,
    token_T: Tensor,
    chosen_BTGn: Tensor,
) -> Tensor:
    """Attend to the tokens of the chosen blocks, up to each query: (B, T, G, R, K)."""
    S, n_numbers = k_BSGK.shape[1], len(blocks.start_C)
    first_T11 = blocks.first_S[token_T][:, None, None]
    # Unused choices go to an extra number, which is dropped.
    number = torch.where(chosen_BTGn < 0, n_numbers, chosen_BTGn + first_T11)
    picked = number.new_zeros(*number.shape[:-1], n_numbers + 1, dtype=torch.bool)
    picked = picked.scatter(-1, number, True)
    past_TS = torch.arange(S, device=token_T.device) <= token_T[:, None]
    visible_BTGS = picked[..., blocks.of_token_S[:S]] & past_TS[:, None]
    o_BGRTK = F.scaled_dot_product_attention(
        q_BTGRK.permute(0, 2, 3, 1, 4).flatten(0, 1),
        _for_each_query_head(k_BSGK, q_BTGRK),
        _for_each_query_head(v_BSGK, q_BTGRK),
        attn_mask=visible_BTGS.transpose(1, 2).flatten(0, 1)[:, None],
    ).unflatten(0, (-1, k_BSGK.shape[2]))
    return o_BGRTK.permute(0, 3, 1, 2, 4)


def _for_each_query_head(x_BSGK: Tensor, q_BTGRK: Tensor) -> Tensor:
    """Expand to (B G, R, S, K): a view if B or G is 1."""
    return x_BSGK.transpose(1, 2).flatten(0, 1)[:, None].expand(-1, q_BTGRK.shape[3], -1, -1)
