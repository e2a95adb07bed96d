"""One token of a linear recurrence of any kind: a decode step.

    S_t = D_t S_{t-1} + k_t u_t^T        o_t = scale S_t^T q_t
    u_t = v_t                                     gated linear attention and RetNet, Mamba-2
    u_t = beta_t (v_t - (D_t S_{t-1})^T k_t)      the delta rules

with D_t diagonal: 1, one factor per head or one per key channel. A step is bound by reading and
writing S. On CUDA a Triton kernel does each once. Shapes: B sequences, H heads, K key and V value
head dim; S is stored K x V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.recurrent_step.triton import launch

IMPLS = ("auto", "torch", "triton")


@torch.no_grad()
def recurrent_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g: Tensor | None,
    beta_BH: Tensor | None,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Run one token of every sequence and update `state_BHKV` (fp32) in place; returns o (B, H, V).

    g       log decay (B, H, 1) or (B, H, K); None without decay
    beta    (B, H) write strength of a delta rule; None for other recurrences
    scale   q is multiplied by it; K**-0.5 if None
    impl    "triton" on CUDA, "torch" elsewhere; "auto" chooses
    """
    scale = float(q_BHK.shape[-1] ** -0.5 if scale is None else scale)
    assert impl in IMPLS, f"impl must be one of {IMPLS}, got {impl!r}"
    if impl == "triton" or (impl == "auto" and _kernel_supports(state_BHKV)):
        return recurrent_step_triton(q_BHK, k_BHK, v_BHV, g, beta_BH, state_BHKV, scale)
    q_BHK, k_BHK, v_BHV_32 = q_BHK.float() * scale, k_BHK.float(), v_BHV.float()
    keep = None if g is None else g.float().exp()
    if beta_BH is None:
        o_BHV = _sum_step(q_BHK, k_BHK, v_BHV_32, keep, state_BHKV)
    else:
        o_BHV = _delta_step(q_BHK, k_BHK, v_BHV_32, keep, beta_BH.float(), state_BHKV)
    return o_BHV.to(v_BHV.dtype)


def _kernel_supports(state_BHKV: Tensor) -> bool:
    return state_BHKV.is_cuda and state_BHKV.dtype == torch.float32 and state_BHKV.is_contiguous()


@torch.library.custom_op("lt2::recurrent_step", mutates_args={"state"})
def recurrent_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
) -> Tensor:
    """Run `recurrent_step` with the Triton kernel, as an operator for torch.compile."""
    assert _kernel_supports(state), "the state must be contiguous, fp32 and on CUDA"
    with torch.cuda.device_of(state):
        return launch(q, k, v, g, beta, state, scale)


recurrent_step_triton.register_fake(lambda q, k, v, *_: v.new_empty(v.shape))


def _sum_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, keep: Tensor | None, state_BHKV: Tensor
) -> Tensor:
    if keep is not None:
        state_BHKV.mul_(keep[..., None])
    state_BHKV.addcmul_(k_BHK[..., None], v_BHV[:, :, None])
    return (q_BHK[:, :, None] @ state_BHKV)[:, :, 0]


def _delta_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    keep: Tensor | None,
    beta_BH: Tensor,
    state_BHKV: Tensor,
) -> Tensor:
    """Read the old state for q and k at once; this token's write reaches o through q.k alone.

    S_t^T q = S^T (D q) + (k.q) u
    """
    readers_BH2K = torch.stack([q_BHK, k_BHK], dim=2)
    if keep is not None:
        readers_BH2K = readers_BH2K * keep[:, :, None]
    read_BH2V = readers_BH2K @ state_BHKV
    write_BHV = (v_BHV - read_BH2V[:, :, 1]) * beta_BH[..., None]
    if keep is not None:
        state_BHKV.mul_(keep[..., None])
    state_BHKV.addcmul_(k_BHK[..., None], write_BHV[:, :, None])
    qk_BH1 = (q_BHK * k_BHK).sum(-1, keepdim=True)
    return torch.addcmul(read_BH2V[:, :, 0], qk_BH1, write_BHV)
