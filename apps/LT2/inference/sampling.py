"""Choosing the next token from logits: greedy, temperature, top-k and top-p.

The random numbers come from the caller, one in [0, 1) for each token. So a sequence that has its
own stream of them (`sequence_rng`) gets the same tokens whatever else is in its batch.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from lingua.errors import UserError


def check_sampling(temperature: float, top_p: float | None, top_k: int | None) -> None:
    if not 0 <= temperature < math.inf:  # catches NaN, too
        raise UserError(f"temperature={temperature} must be 0 (greedy) or a number above 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1, or null for no limit")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1, or null for no limit")


def sequence_rng(seed: int, prompt: int, sample: int) -> random.Random:
    """The stream of random numbers of the n-th sample of the n-th prompt, the same on every
    machine."""
    return random.Random(f"{seed} {prompt} {sample}")


def all_finite(logits_NV: Tensor) -> Tensor:
    """(N,) bool, by one pass over the logits."""
    low_N, high_N = logits_NV.aminmax(dim=-1)  # a NaN is both
    return low_N.isfinite() & high_N.isfinite()


def sample_tokens(
    logits_BV: Tensor,
    u_B: Tensor,
    *,
    temperature: float,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Tensor:
    """A token id for each row, (B,) int64; `u_B` in [0, 1), best on the host, decides which
    (unused when greedy). Of logits that are not all finite it is any id, see `all_finite`.

    temperature 0 takes the likeliest token. top_k keeps the k likeliest ones, and top_p the fewest
    likeliest ones of those whose probabilities reach p together; the rest is never drawn.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    scores = logits_BV.double()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    order = None  # token ids by falling probability, where that is needed
    if top_k is not None:
        scores, order = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
    elif top_p is not None:
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
    probs = scores.softmax(dim=-1)
    if top_p is not None:
        likelier = probs.cumsum(dim=-1) - probs  # 0 for the first one, which therefore stays
        probs = probs.where(likelier < top_p, 0)
    picked = invert_cdf(probs, u_B)
    return picked if order is None else order.gather(-1, picked[:, None])[:, 0]


def invert_cdf(weights_BN: Tensor, u_B: Tensor) -> Tensor:
    """The index at which the running sum of weights passes the share u of the total; never one of
    weight 0. Any index where weights are NaN."""
    sums = weights_BN.cumsum(dim=-1)
    total = sums[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # u * total may round up to the total
    target = torch.minimum(u_B.to(sums, non_blocking=True)[:, None] * total, below)
    index = torch.searchsorted(sums, target, right=True)[:, 0]
    return index.clamp(max=weights_BN.shape[-1] - 1)  # past the end among NaNs
