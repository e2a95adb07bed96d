"""The step's Triton kernel as a custom operator, so that the layer around it compiles whole."""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.recurrent_step.triton import launch


def kernel_can(state_BHKV: Tensor) -> bool:
    """Whether the kernel serves this state."""
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
    """Same arguments and result as `recurrent_step`."""
    assert kernel_can(state), "the state must be contiguous, fp32 and on CUDA"
    with torch.cuda.device(state.device):
        return launch(q, k, v, g, beta, state, scale)


@recurrent_step_triton.register_fake
def _(q, k, v, g, beta, state, scale):
    return v.new_empty(v.shape)
