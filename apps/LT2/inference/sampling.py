"""Choose the next token from logits: greedy, temperature, top-k and top-p.

The caller passes one random number in [0, 1) for each token. A sequence with its own stream of
numbers (`sequence_rng`) gets the same tokens in any batch.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from lingua.errors import UserError


def check_sampling(temperature: float, top_p: float | None, top_k: int | None) -> None:
    if not 0 <= temperature < math.inf:  # also false for NaN
        raise UserError(f"temperature={temperature} must be 0 (greedy) or a number above 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1, or null for no limit")
    if top_k is not None and top_k < -1:
        raise UserError(f"top_k={top_k} must be at least 1, or null, 0 or -1 for no limit")


def sequence_rng(seed: int, prompt: int, sample: int) -> random.Random:
    """Return the random numbers of one sample of one prompt; they are equal on every machine."""
    return random.Random(f"{seed} {prompt} {sample}")


def all_finite(logits_NV: Tensor) -> Tensor:
    """Return (N,) bool: no logit of the row is NaN or infinite."""
    low_N, high_N = logits_NV.aminmax(dim=-1)  # reads the logits once; both are NaN if any is
    return low_N.isfinite() & high_N.isfinite()


def sample_tokens(
    logits_BV: Tensor,
    u_B: Tensor,
    *,
    temperature: float,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Return a token id for each row, (B,) int64; it is arbitrary if logits aren't `all_finite`.

    temperature=0 returns the argmax. Otherwise `u_B` in [0, 1), preferably on the host, selects a
    token. top_k keeps the k most probable tokens; None, 0 and -1 keep all. top_p then keeps the
    fewest of the most probable tokens whose probabilities sum to at least p.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    scores = logits_BV.double()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    order = None  # token ids in descending probability, if sorted
    if top_k is not None and top_k > 0:
        scores, order = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
    elif top_p is not None:
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
    probs = scores.softmax(dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs  # 0 for the first token, which always stays
        probs = probs.where(before < top_p, 0)
    picked = invert_cdf(probs, u_B)
    return picked if order is None else order.gather(-1, picked[:, None])[:, 0]


def invert_cdf(weights_BN: Tensor, u_B: Tensor) -> Tensor:
    """Return the index where the cumulative weight exceeds u * total; its weight is never 0.

    Rows with NaN give an arbitrary index.
    """
    sums = weights_BN.cumsum(dim=-1)
    total = sums[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # u * total may round up to total
    target = torch.minimum(u_B.to(sums, non_blocking=True)[:, None] * total, below)
    index = torch.searchsorted(sums, target, right=True)[:, 0]
    return index.clamp(max=weights_BN.shape[-1] - 1)  # NaN searches past the end
