"""Prompts of different lengths as one row without padding, and the scores of their tokens.

Shapes: T tokens of all prompts together, n prompts, N tokens to score, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.kernel.documents import upload, upload_cu_seqlens
from apps.LT2.transformer import LoopedTransformer
from lingua.errors import UserError


def pack_prompts(
    prompts: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """All prompts in one row (1, T) int64, and their bounds (n + 1,) int32."""
    tokens = upload(list(itertools.chain(*prompts)), device, torch.int64)
    bounds = list(itertools.accumulate((len(prompt) for prompt in prompts), initial=0))
    return tokens[None], upload_cu_seqlens(bounds, device)


def check_tokens(texts: Iterable[Sequence[int]], model: LoopedTransformer) -> None:
    """UserError for a token outside of the vocabulary, which on CUDA would end the process."""
    vocab_size = model.args.vocab_size
    for tokens in filter(len, texts):
        strange = min(tokens) if min(tokens) < 0 else max(tokens)
        if not 0 <= strange < vocab_size:
            raise UserError(
                f"token {strange} is none of the model's (model.vocab_size={vocab_size}): the "
                "tokenizer that made it is not that of the training run"
            )


def score_prompts(
    logits_TV: Tensor, tokens_T: Tensor, lengths: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """(log-likelihood, greedy) of each prompt's tokens but its first, which nothing predicts."""
    target_T = tokens_T.roll(-1)  # the last token of a prompt has no target; dropped below
    pieces = fetch_scores([score_tokens(logits_TV, target_T)], lengths)
    return [(loglikelihood[:-1], greedy[:-1]) for loglikelihood, greedy in pieces]


def score_tokens(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """(2, N) fp32: log p of each target, and 1 where it is the likeliest token, else 0."""
    logp_N = -F.cross_entropy(logits_NV, target_N, reduction="none")
    return torch.stack((logp_N, (logits_NV.argmax(dim=-1) == target_N).type_as(logp_N)))


def fetch_scores(scores: Sequence[Tensor], lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """`score_tokens` of tokens that follow each other, cut into pieces of `lengths` and brought to
    the CPU at once: (log p in fp32, bool)."""
    logp_N, greedy_N = torch.cat(list(scores), dim=1).cpu()
    return list(zip(logp_N.split(lengths), greedy_N.bool().split(lengths), strict=True))
