"""The loss of a looped model: of the last loop, or of every loop.

    model.loop_loss=none              L_T, the cross-entropy after the last of T loops
    model.loop_loss=uniform           the mean of L_1, ..., L_T
    model.loop_loss=[1, 1, 2, 4]      their weighted mean
    model.loop_loss=gate              the mean over exits that the model chooses for each token

The gate is Ouro's (https://arxiv.org/abs/2510.25741). With h_t, the input of the head after loop t,

    lambda_t = sigmoid(w h_t + b)                           of a token that hasn't left before
    p_t = lambda_t * (1 - lambda_1) ... (1 - lambda_t-1)    p_T takes the rest
    loss = mean over tokens of  sum_t p_t L_t - loop_entropy * H(p)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingua.errors import UserError


class ExitGate(nn.Module):
    """Ouro's gate, shared by all loops: a linear map of the normed state to a logit, in fp32.

    A token that is still there leaves with probability sigmoid(logit). See kernel/exit_gate.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def log_exit_distribution(logits: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return log p (T, N) in fp32 from the logits of all loops but the last, each (N,).

    `like` (N,) gives the shape and device if T = 1.
    """
    stays = torch.zeros_like(like, dtype=torch.float32)
    log_p = []
    for logit in logits:
        log_p.append(stays + F.logsigmoid(logit))
        stays = stays + F.logsigmoid(-logit)
    return torch.stack([*log_p, stays])


def check_loop_loss(loop_loss: Any, loop_count: int) -> None:
    """Raise UserError unless `loop_loss` is a name or a weight for each loop."""
    option = f"model.loop_loss={'null' if loop_loss is None else loop_loss}"
    if loop_loss in ("none", "uniform", "gate"):
        return
    if not isinstance(loop_loss, list) or not all(_is_number(w) for w in loop_loss):
        raise UserError(f"{option} must be none, uniform, gate, or a list of weights as in [1, 2]")
    if len(loop_loss) != loop_count:
        raise UserError(
            f"{option} has {len(loop_loss)} weights; it needs one for each loop, "
            f"model.loop_count={loop_count}"
        )
    if min(loop_loss) < 0 or not sum(loop_loss) > 0:
        raise UserError(f"{option}: weights must not be negative, and one must be above 0")


def check_exits(loop_loss: Any, loop_count: int) -> None:
    """Raise UserError for a gate that training can't use."""
    if loop_loss == "gate" and loop_count == 1:
        raise UserError(
            "model.loop_loss=gate with model.loop_count=1 has no exit to choose; use none, or "
            "more loops"
        )


def check_loops_with_weight(loop_loss: Any, loops: Iterable[int]) -> None:
    """Raise UserError if a step of one of `loops` loops would have no loss."""
    for n_loops in sorted(loops) if isinstance(loop_loss, list) else ():
        if not sum(loop_loss[:n_loops]) > 0:
            raise UserError(
                f"model.loop_loss={loop_loss} has no weight in steps of {n_loops} loops; give one "
                f"of the first {n_loops} loops a weight above 0"
            )


def loop_weights(loop_loss: Any, n_loops: int) -> list[float]:
    """Return the weights of a step of `n_loops` loops, with sum 1."""
    weights = [1.0] * n_loops if loop_loss == "uniform" else loop_loss[:n_loops]
    return [weight / sum(weights) for weight in weights]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
