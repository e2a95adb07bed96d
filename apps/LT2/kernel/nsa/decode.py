"""Native sparse attention of one new token per row, from a cache of keys, values and block means.

No shape depends on the cached length. Only the means, the chosen blocks and the window are read.
Shapes: B rows, H query heads, G key/value heads, R = H / G, K head dim, S slots (position p is in
slot p), C = S / size blocks of slots, n chosen blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.attention import decode_attention
from apps.LT2.kernel.nsa.blocked import compressed_weights
from apps.LT2.kernel.nsa.blocks import choose_blocks, wide


def update_means(x_BSGK: Tensor, mean_BCGK: Tensor, position_B: Tensor) -> None:
    """Update the mean of each row's newest block in place.

    No query reads it before the block is complete, so this needs no branch.
    """
    row = torch.arange(len(x_BSGK), device=x_BSGK.device)
    size = x_BSGK.shape[1] // mean_BCGK.shape[1]
    block_B = position_B // size
    members_BsGK = x_BSGK.unflatten(1, (-1, size))[row, block_B]
    mean_BCGK[row, block_B] = wide(members_BsGK).mean(1).to(mean_BCGK.dtype)


def branches_of_step(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    k_BCGK: Tensor,
    v_BCGK: Tensor,
    position_B: Tensor,
    *,
    n_blocks: int,
    window_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return compressed, selected and window attention, (B, H, K) each, at `position_B`.

    The cache already holds the token's key and value.
    """
    n_slots, G = k_BSGK.shape[1:3]
    size = n_slots // k_BCGK.shape[1]
    row = torch.arange(len(q_BHK), device=q_BHK.device)
    q_BGRK = q_BHK.unflatten(1, (G, -1))

    block_C = torch.arange(k_BCGK.shape[1], device=q_BHK.device)
    seen_BC = block_C < ((position_B + 1) // size)[:, None]
    weights_BGRC = compressed_weights(q_BGRK, k_BCGK.transpose(1, 2), seen_BC[:, None, None])
    compressed = (weights_BGRC @ wide(v_BCGK).transpose(1, 2)).type_as(q_BHK)

    own_B11 = (position_B // size)[:, None, None]
    zero = torch.zeros_like(own_B11)
    chosen_BGn = choose_blocks(weights_BGRC.sum(2), zero, own_B11, n_blocks)
    head_G1 = torch.arange(G, device=q_BHK.device)[:, None]
    place = (row[:, None, None], chosen_BGn.clamp(min=0), slice(None), head_G1)
    token_BGns = chosen_BGn[..., None] * size + torch.arange(size, device=q_BHK.device)
    visible_BGns = (chosen_BGn >= 0)[..., None] & (token_BGns <= position_B[:, None, None, None])
    k_BGnsK, v_BGnsK = (x.unflatten(1, (-1, size))[place] for x in (k_BSGK, v_BSGK))
    selected = F.scaled_dot_product_attention(
        q_BGRK,
        k_BGnsK.flatten(2, 3).type_as(q_BHK),
        v_BGnsK.flatten(2, 3).type_as(q_BHK),
        attn_mask=visible_BGns.flatten(2)[:, :, None],
    )

    window_size = min(window_size, n_slots)
    # Newest first, so the valid slots are a prefix.
    slot_Bw = (position_B[:, None] - torch.arange(window_size, device=q_BHK.device)).clamp(min=0)
    k_BwGK, v_BwGK = (x[row[:, None], slot_Bw].type_as(q_BHK) for x in (k_BSGK, v_BSGK))
    n_valid_B = (position_B + 1).clamp(max=window_size)
    window = decode_attention(q_BHK, k_BwGK, v_BwGK, n_valid_B)
    return compressed.flatten(1, 2), selected.flatten(1, 2), window
