"""Prompts of different lengths as one row without padding, and the scores of their tokens.

Shapes: T tokens of all prompts together, n prompts, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_prompts(
    prompts: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """All prompts in one row (1, T) int64, and their bounds (n + 1,) int32."""
    tokens = torch.tensor([t for prompt in prompts for t in prompt], device=device)
    bounds = list(itertools.accumulate((len(prompt) for prompt in prompts), initial=0))
    return tokens[None], torch.tensor(bounds, dtype=torch.int32, device=device)


def score_prompts(
    logits_TV: Tensor, tokens_T: Tensor, lengths: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """(log-likelihood, greedy) of each prompt's tokens but its first, which nothing predicts."""
    target_T = tokens_T.roll(-1)  # the last token of a prompt has no target; dropped below
    loglikelihood_T = -F.cross_entropy(logits_TV, target_T, reduction="none").cpu()
    greedy_T = (logits_TV.argmax(dim=-1) == target_T).cpu()
    pieces = zip(loglikelihood_T.split(lengths), greedy_T.split(lengths), strict=True)
    return [(loglikelihood[:-1], greedy[:-1]) for loglikelihood, greedy in pieces]
