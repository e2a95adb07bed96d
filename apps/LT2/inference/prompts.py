"""Pack prompts of different lengths into one row without padding, and score their tokens.

Shapes: T tokens of all prompts together, n prompts, N scored tokens, V vocabulary.
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
    """Return all tokens in one row, (1, T) int64, and cu_seqlens, (n + 1,) int32."""
    tokens = upload(list(itertools.chain(*prompts)), device, torch.int64)
    offsets = list(itertools.accumulate((len(prompt) for prompt in prompts), initial=0))
    return tokens[None], upload_cu_seqlens(offsets, device)


def check_tokens(texts: Iterable[Sequence[int]], model: LoopedTransformer) -> None:
    """Raise UserError for a token outside the vocabulary; on CUDA it would end the process."""
    vocab_size = model.args.vocab_size
    for tokens in filter(len, texts):
        worst = min(tokens) if min(tokens) < 0 else max(tokens)
        if not 0 <= worst < vocab_size:
            raise UserError(
                f"token {worst} is outside the model's vocabulary "
                f"(model.vocab_size={vocab_size}); use the tokenizer of the training run"
            )


def score_prompts(
    logits_TV: Tensor, tokens_T: Tensor, lengths: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """Return (log p, is argmax) of each prompt's tokens after the first, on the CPU."""
    target_T = tokens_T.roll(-1)  # the last token of a prompt has no target; dropped below
    scores = fetch_scores([score_tokens(logits_TV, target_T)], lengths)
    return [(logp[:-1], is_argmax[:-1]) for logp, is_argmax in scores]


def score_tokens(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Return (2, N) fp32: log p of each target in nats, and 1 if it is the argmax, else 0."""
    logp_N = -F.cross_entropy(logits_NV, target_N, reduction="none")
    return torch.stack((logp_N, (logits_NV.argmax(dim=-1) == target_N).type_as(logp_N)))


def fetch_scores(scores: Sequence[Tensor], lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Concatenate results of `score_tokens`, fetch them with one sync, and split by `lengths`.

    Returns (log p in fp32, is argmax as bool) for each length, on the CPU.
    """
    logp_N, is_argmax_N = torch.cat(list(scores), dim=1).cpu()
    return list(zip(logp_N.split(lengths), is_argmax_N.bool().split(lengths), strict=True))
