"""Muon: a hidden weight matrix moves along its momentum, orthogonalized.

    M <- momentum M + G          U = G + momentum M (Nesterov)
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonalize(U)

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); with the decay, and the factor that
gives an update the RMS of AdamW's, so that both go by one learning rate, of Liu et al. 2025
(Moonlight, https://arxiv.org/abs/2502.16982). Embeddings, head and vectors are AdamW's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Optimizer

MOMENTUM_BUFFER = "momentum_buffer"  # a matrix's only state
ADAMW_RMS = 0.2  # of AdamW's updates, as Moonlight measured it
# The quintic a x + b x^3 + c x^5, five times, takes singular values of 0.01 to 1 to 0.7 to 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonalize(matrix: Tensor, n_steps: int) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, by Newton-Schulz iteration.

    Singular values come out between 0.7 and 1.2, which does for an update. Computed in bf16 on
    CUDA and in fp32 elsewhere; the result has that dtype.
    """
    X = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X  # the Gram matrix of the shorter side is smaller
    X = X / X.norm().clamp(min=1e-7)  # then no singular value exceeds 1
    a, b, c = COEFFICIENTS
    for _ in range(n_steps):
        gram = X @ X.T
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.T if tall else X


class Muon(Optimizer):
    """Muon for the groups with `muon: True`, AdamW for the others: one optimizer, one rate.

    A matrix that is sharded is gathered for its update, on every rank: of the work of a training
    step that is some percent, and no rank waits for another one's result.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        newton_schulz_steps: int,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
    ):
        """`groups`: params, weight_decay and muon. Their dicts are kept, not copied."""
        self.momentum, self.newton_schulz_steps = momentum, newton_schulz_steps
        others = [group for group in groups if not group["muon"]]
        self.adamw = AdamW(others, lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__(groups, {"lr": lr})
        self.state = self.adamw.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the loss is not computed again"
        for group in self.param_groups:
            if group["muon"]:
                for param in group["params"]:
                    if param.grad is not None:
                        self._move(param, group["lr"], group["weight_decay"])
        self.adamw.step()

    def _move(self, param: Tensor, lr: float, weight_decay: float) -> None:
        grad, state = param.grad, self.state[param]
        assert grad is not None
        if MOMENTUM_BUFFER not in state:
            state[MOMENTUM_BUFFER] = torch.zeros_like(grad)
        momentum = state[MOMENTUM_BUFFER].mul_(self.momentum).add_(grad)
        update = _on_whole_matrix(
            lambda u: orthogonalize(u, self.newton_schulz_steps),
            grad.add(momentum, alpha=self.momentum),
        )
        param.mul_(1 - lr * weight_decay)
        param.add_(update.to(param.dtype), alpha=-lr * ADAMW_RMS * math.sqrt(max(param.shape)))


def _on_whole_matrix(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """function(matrix), laid out over ranks as `matrix` is."""
    if not isinstance(matrix, DTensor):
        return function(matrix)
    mesh, placements = matrix.device_mesh, matrix.placements
    whole = function(matrix.full_tensor())
    everywhere = [Replicate()] * mesh.ndim
    return DTensor.from_local(whole, mesh, everywhere, run_check=False).redistribute(
        mesh, placements
    )
