"""A decode step of Gated DeltaNet from the convolved streams to the input of the output projection.

On CUDA one kernel does it. Shapes: B rows, H heads, K key dim, V value dim, C = H (2 K + V).
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.decode_linear import KERNEL_DTYPES, launches_early
from apps.LT2.kernel.gated_delta_rule.decode_triton import launch

MAX_STATE = 128 * 256  # of a head, dims rounded up to powers of two: more does not fit in registers


def layer_step_supports(streams_BC: Tensor, state_BHKV: Tensor) -> bool:
    half = streams_BC.is_cuda and streams_BC.dtype in KERNEL_DTYPES
    return half and fits(*state_BHKV.shape[-2:]) and state_BHKV.is_contiguous()


def fits(K: int, V: int) -> bool:
    """Whether the kernel can hold the state of a head."""
    return (1 << (K - 1).bit_length()) * (1 << (V - 1).bit_length()) <= MAX_STATE


@torch.library.custom_op("lt2::gated_delta_layer_step", mutates_args={"state"})
def gated_delta_layer_step(
    streams: Tensor,
    gate: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    eps: float,
    allow_neg_eigval: bool,
    state: Tensor,
) -> Tensor:
    """Return the gated and normed output of each head, (B, H V), in gate's dtype.

    streams       (B, C)        q, k and v after convolution and SiLU, in order
    gate          (B, H V)      before its SiLU
    a, b          (B, H)        inputs of decay and write strength
    A_log         (H,), dt_bias (H,), norm (V,) with eps: parameters of the layer
    state         (B, H, K, V)  fp32, updated in place
    """
    early = launches_early(state.device)
    with torch.cuda.device_of(state):
        parameters = (A_log, dt_bias, norm, eps, allow_neg_eigval)
        return launch(streams, gate, a, b, *parameters, state, early=early)


gated_delta_layer_step.register_fake(lambda streams, gate, *_: gate.new_empty(gate.shape))
