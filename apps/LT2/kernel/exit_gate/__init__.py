"""The exit gate, in one kernel with the norm before it.

`exit_logit` is for training. `exit_by_gate` decides in inference which tokens leave after a loop:

    stay_t = stay_t-1 + log(1 - sigmoid(gate(norm(h))))        leave if stay_t <= log(1 - threshold)

stay is the log of the probability that a token has not left. Shapes: N tokens, D model dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.exit_gate.triton import launch
from apps.LT2.kernel.fused import fused_on_cuda

IMPLS = ("auto", "torch", "triton")


def _exit_logit(
    h_ND: Tensor, norm_D: Tensor, eps: float, weight_D: Tensor, bias_1: Tensor
) -> Tensor:
    """Return the logit (N,) in fp32 of leaving after a loop. Arguments as in `exit_by_gate`."""
    wide = h_ND.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * scale * norm_D.float()).type_as(h_ND)
    return normed.float() @ weight_D.float() + bias_1.float()


# Every token passes norm and gate. Plain torch would read and write states in fp32 many times.
exit_logit = fused_on_cuda(1)(_exit_logit)


@torch.no_grad()
def exit_by_gate(
    h_ND: Tensor,
    left_N: Tensor,
    stay_N: Tensor | None,
    norm_D: Tensor,
    eps: float,
    weight_D: Tensor,
    bias_1: Tensor,
    threshold: float,
    *,
    held_ND: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (h, left, stay) after the decision.

    left    bool, tokens that had left before; the result adds the tokens that leave now
    stay    fp32, None before the first decision
    norm    weight of the RMSNorm with `eps` before the gate
    weight, bias    of the gate, whose sum is fp32
    held    states of the tokens that had left before, which replace theirs in h
    impl    "triton" on CUDA, "torch" elsewhere; "auto" chooses
    """
    assert impl in IMPLS, f"impl must be one of {IMPLS}, got {impl!r}"
    limit = math.log1p(-threshold)
    if impl == "triton" or (impl == "auto" and h_ND.is_cuda):
        with torch.cuda.device_of(h_ND):
            gate = (norm_D, eps, weight_D, bias_1, limit)
            return launch(h_ND, left_N, stay_N, *gate, held_ND)
    if held_ND is not None:
        h_ND = torch.where(left_N[:, None], held_ND, h_ND)
    stay = F.logsigmoid(-_exit_logit(h_ND, norm_D, eps, weight_D, bias_1))
    stay = stay if stay_N is None else stay_N + stay
    return h_ND, left_N | (stay <= limit), stay
