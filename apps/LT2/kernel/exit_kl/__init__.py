"""KL between the predictions of two successive loops, which decides by exit=kl which tokens leave.

Shapes: ... tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.kernel.exit_kl.triton import launch

IMPLS = ("auto", "torch", "triton")


@torch.no_grad()
def kl_of_logits(before: Tensor, after: Tensor, *, impl: str = "auto") -> Tensor:
    """Return KL(before || after) (...) in nats of logits (..., V), fp32.

    impl: "triton" on CUDA, "torch" elsewhere; "auto" chooses
    """
    assert impl in IMPLS, f"impl must be one of {IMPLS}, got {impl!r}"
    if impl == "triton" or (impl == "auto" and before.is_cuda):
        with torch.cuda.device_of(before):
            return launch(before.flatten(0, -2), after.flatten(0, -2)).view(before.shape[:-1])
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
