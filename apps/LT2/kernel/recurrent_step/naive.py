"""One token of a linear recurrence, as its equations state."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent_step_naive(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g: Tensor | None,
    beta_BH: Tensor | None,
    state_BHKV: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return o (B, H, V) and the new state, both in the state's dtype; mutates nothing."""
    q, k, v = (x.to(state_BHKV.dtype) for x in (q_BHK, k_BHK, v_BHV))
    S = state_BHKV if g is None else g.to(state_BHKV.dtype).exp()[..., None] * state_BHKV
    u = v
    if beta_BH is not None:
        held = torch.einsum("bhkv,bhk->bhv", S, k)
        u = beta_BH.to(state_BHKV.dtype)[..., None] * (v - held)
    S = S + torch.einsum("bhk,bhv->bhkv", k, u)
    return scale * torch.einsum("bhkv,bhk->bhv", S, q), S
