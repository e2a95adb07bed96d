"""Compute log-likelihoods of continuations, in packed windows that the ranks share.

    scores = score_continuations(model, [(context, continuation), ...], max_len=4096, ...)

A request longer than the model's window loses the start of its context, never any of its
continuation. A continuation longer than the window is scored in several windows, each with as many
preceding tokens as fit. The batches don't depend on the number of ranks, and one rank computes each
batch. So the scores are bitwise equal on any number of ranks.

Shapes: T tokens of a packed batch, N of them scored, D model dim, V vocabulary size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F

from apps.LT2.exits import ExitRule, exit_states
from apps.LT2.inference.prompts import check_tokens, fetch_scores, pack_prompts, score_tokens
from apps.LT2.kernel.documents import upload
from apps.LT2.transformer import LoopedTransformer
from lingua.distributed import gather_objects, get_global_rank, get_world_size, run_together
from lingua.errors import UserError

Tokens = Sequence[int]
B = TypeVar("B")
R = TypeVar("R")

LOGITS_AT_ONCE = 2**28  # 1 GiB in fp32


class EvaluationStopped(Exception):
    """A rank was asked to stop. Raised on all ranks."""


@dataclass(frozen=True)
class Window:
    """Part of one request: the model reads tokens[:-1], and the last `n_targets` are scored."""

    request: int
    tokens: Tokens
    n_targets: int


def cut_windows(
    request: int, context: Tokens, continuation: Tokens, max_len: int, stride: int | None = None
) -> Iterator[Window]:
    """Yield windows of at most `max_len` input tokens that score each continuation token once.

    The first window scores as many tokens as fit, each later one scores `stride` (default:
    max_len). A smaller stride gives each token more context and costs more.
    """
    assert context, "the first token of a continuation needs a token before it"
    done = 0
    while done < len(continuation):
        step = max_len if done == 0 or stride is None else min(stride, max_len)
        end = min(done + step, len(continuation))
        n_context = max_len + 1 - end  # context tokens that fit
        if n_context > 0:
            tokens = [*context[-n_context:], *continuation[:end]]
        else:
            tokens = continuation[-n_context:end]
        yield Window(request, tokens, end - done)
        done = end


def pack_windows(windows: Iterable[Window], max_tokens: int) -> list[list[Window]]:
    """Return batches of at most `max_tokens` input tokens, longest windows first."""
    batches: list[list[Window]] = []
    room = 0
    for window in sorted(windows, key=lambda w: -len(w.tokens)):
        size = len(window.tokens) - 1
        if not batches or size > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(window)
        room -= size
    return batches


def score_continuations(
    model: LoopedTransformer,
    requests: Sequence[tuple[Tokens, Tokens]],
    *,
    max_len: int,
    max_tokens: int,
    stride: int | None = None,
    rule: ExitRule | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Sequence], Iterable] = iter,
) -> list[tuple[float, bool]]:
    """Return (log p in nats, is argmax) for each (context, continuation) pair.

    With `rule`, tokens leave the loops early, also in contexts.
    The flag is True if greedy decoding generates the continuation. An empty continuation scores
    (0, True). `max_tokens` limits a batch; a longer window gets a separate batch. A collective:
    all ranks pass the same requests and get all scores. UserError for a token outside the model's
    vocabulary.
    """
    check_tokens((tokens for request in requests for tokens in request), model)
    windows = [
        window
        for i, (context, continuation) in enumerate(requests)
        for window in cut_windows(i, context, continuation, max_len, stride)
    ]
    batches = pack_windows(windows, max_tokens)
    scores = map_on_ranks(
        batches,
        lambda batch: score_batch(model, batch, rule),
        should_stop=should_stop,
        progress=progress,
    )
    loglikelihood, greedy = [0.0] * len(requests), [True] * len(requests)
    for batch, results in zip(batches, scores, strict=True):
        for window, (nats, is_greedy) in zip(batch, results, strict=True):
            loglikelihood[window.request] += nats
            greedy[window.request] &= is_greedy
    return list(zip(loglikelihood, greedy, strict=True))


def map_on_ranks(
    batches: Sequence[B],
    work: Callable[[B], R],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Sequence], Iterable] = iter,
) -> list[R]:
    """Run `work` on every batch, distributed round-robin, and return all results on all ranks.

    A collective. An error on one rank is raised on all. Each rank calls `should_stop` before each
    batch; if it is true on any rank, all ranks raise EvaluationStopped.
    """
    rank, world_size = get_global_rank(), get_world_size()

    def run_my_batches() -> dict[int, R] | None:
        done: dict[int, R] = {}
        for i in progress(range(rank, len(batches), world_size)):
            if should_stop():
                return None
            done[i] = work(batches[i])
        return done

    shares = gather_objects(run_together(run_my_batches))
    if any(share is None for share in shares):
        raise EvaluationStopped
    results = {i: result for share in shares for i, result in share.items()}
    return [results[i] for i in range(len(batches))]


@torch.no_grad()
def score_batch(
    model: LoopedTransformer, batch: Sequence[Window], rule: ExitRule | None = None
) -> list[tuple[float, bool]]:
    """Return (log p in nats, is argmax) for each window of one packed batch."""
    device = model.tok_embeddings.weight.device
    tokens_1T, cu_seqlens = pack_prompts([window.tokens[:-1] for window in batch], device)
    if rule is None:
        h_TD = model.hidden_states(tokens_1T, cu_seqlens)[0]
    else:
        h_TD = model.norm(exit_states(model, tokens_1T, rule, cu_seqlens)[0])[0]
    ends = itertools.accumulate(len(window.tokens) - 1 for window in batch)
    positions = [
        position
        for window, end in zip(batch, ends, strict=True)
        for position in range(end - window.n_targets, end)
    ]
    targets = [token for window in batch for token in window.tokens[-window.n_targets :]]
    h_ND = h_TD[upload(positions, device, torch.int64)]
    target_N = upload(targets, device, torch.int64)
    n_at_once = max(1, LOGITS_AT_ONCE // model.head_weight.shape[0])  # limits memory
    scores = [
        score_tokens(F.linear(h, model.head_weight).float(), target)
        for h, target in zip(h_ND.split(n_at_once), target_N.split(n_at_once), strict=True)
    ]
    # Sum in fp64, so that the sum over thousands of tokens doesn't depend on the windows.
    results = [
        (math.fsum(logp.tolist()), bool(greedy.all()))
        for logp, greedy in fetch_scores(scores, [window.n_targets for window in batch])
    ]
    if not all(math.isfinite(nats) for nats, _ in results):
        raise UserError("the model's logits are NaN or infinite; use another checkpoint")
    return results
