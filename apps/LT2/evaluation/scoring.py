"""Log-likelihoods of continuations: cut into windows, packed without padding, shared by the ranks.

    scores = score_continuations(model, [(context, continuation), ...], max_len=4096, ...)

What is longer than the model's window loses tokens at the start of its context, never of its
continuation: a continuation that is too long itself is read in several windows, each with as much
of the past as fits. Batches are made the same way on any number of ranks and each is computed by
one of them, so that the numbers are those of a single process. Shapes: T tokens of a packed batch,
N of them scored, D model width, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from apps.LT2.inference.prompts import check_tokens, fetch_scores, pack_prompts, score_tokens
from apps.LT2.kernel.documents import upload
from apps.LT2.transformer import LoopedTransformer
from lingua.distributed import gather_objects, run_together
from lingua.errors import UserError

Tokens = Sequence[int]
B = TypeVar("B")
R = TypeVar("R")

LOGITS_AT_ONCE = 2**28  # numbers: 1 GiB in fp32


class EvaluationStopped(Exception):
    """Some rank was asked to leave; raised on all of them."""


@dataclass(frozen=True)
class Window:
    """A piece of one request: `tokens` but the last are read, and the last n_targets are scored."""

    request: int
    tokens: Tokens
    n_targets: int


def cut_windows(
    request: int, context: Tokens, continuation: Tokens, max_len: int, stride: int | None = None
) -> Iterator[Window]:
    """Windows of at most `max_len` tokens to read, in which each token to score is scored once.

    The first one scores as much as it can, those after it move on by `stride` tokens; None is
    max_len. A smaller one gives every token more of its past, at more cost.
    """
    assert context, "the first token of a continuation needs one before it"
    done = 0
    while done < len(continuation):
        step = max_len if done == 0 or stride is None else min(stride, max_len)
        end = min(done + step, len(continuation))
        n_context = max_len + 1 - end  # tokens of the context that still fit
        if n_context > 0:
            tokens = [*context[-n_context:], *continuation[:end]]
        else:
            tokens = continuation[-n_context:end]
        yield Window(request, tokens, end - done)
        done = end


def pack_windows(windows: Iterable[Window], max_tokens: int) -> list[list[Window]]:
    """Batches of at most `max_tokens` tokens to read, longest windows first."""
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
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Sequence], Iterable] = iter,
) -> list[tuple[float, bool]]:
    """(log p in nats, whether greedy decoding would say it) of each (context, continuation).

    An empty continuation has (0, True). A collective: every rank gives the same requests and gets
    all scores. `max_tokens` bounds a batch; a longer window is a batch of its own. UserError for a
    token that the model has no piece for.
    """
    check_tokens((tokens for request in requests for tokens in request), model)
    windows = [
        window
        for i, (context, continuation) in enumerate(requests)
        for window in cut_windows(i, context, continuation, max_len, stride)
    ]
    batches = pack_windows(windows, max_tokens)
    scores = share_out(
        batches, lambda batch: score_batch(model, batch), should_stop=should_stop, progress=progress
    )
    loglikelihood, greedy = [0.0] * len(requests), [True] * len(requests)
    for batch, results in zip(batches, scores, strict=True):
        for window, (nats, is_greedy) in zip(batch, results, strict=True):
            loglikelihood[window.request] += nats
            greedy[window.request] &= is_greedy
    return list(zip(loglikelihood, greedy, strict=True))


def share_out(
    batches: Sequence[B],
    work: Callable[[B], R],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Sequence], Iterable] = iter,
) -> list[R]:
    """`work` on every batch, each by one rank in turn; all results on all ranks. A collective.

    A rank that fails fails the others. `should_stop` is asked before every batch; where any rank
    said yes, all raise EvaluationStopped, after what each of them had begun.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def my_part() -> dict[int, R] | None:
        done: dict[int, R] = {}
        for i in progress(range(rank, len(batches), world_size)):
            if should_stop():
                return None
            done[i] = work(batches[i])
        return done

    parts = gather_objects(run_together(my_part))
    if any(part is None for part in parts):
        raise EvaluationStopped
    everything = {i: result for part in parts for i, result in part.items()}
    return [everything[i] for i in range(len(batches))]


@torch.no_grad()
def score_batch(model: LoopedTransformer, batch: Sequence[Window]) -> list[tuple[float, bool]]:
    """Scores of each window of one packed batch."""
    device = model.tok_embeddings.weight.device
    tokens_1T, cu_seqlens = pack_prompts([window.tokens[:-1] for window in batch], device)
    h_TD = model.hidden_states(tokens_1T, cu_seqlens)[0]
    ends = itertools.accumulate(len(window.tokens) - 1 for window in batch)
    places = [
        place
        for window, end in zip(batch, ends, strict=True)
        for place in range(end - window.n_targets, end)
    ]
    targets = [token for window in batch for token in window.tokens[-window.n_targets :]]
    h_ND, target_N = h_TD[upload(places, device, torch.int64)], upload(targets, device, torch.int64)
    n_at_once = max(1, LOGITS_AT_ONCE // model.head_weight.shape[0])  # so few have logits at a time
    scores = [
        score_tokens(F.linear(h, model.head_weight).float(), target)
        for h, target in zip(h_ND.split(n_at_once), target_N.split(n_at_once), strict=True)
    ]
    # Sums in fp64: a sum over thousands of tokens then does not depend on how they were cut.
    results = [
        (math.fsum(logp.tolist()), bool(greedy.all()))
        for logp, greedy in fetch_scores(scores, [window.n_targets for window in batch])
    ]
    if not all(math.isfinite(nats) for nats, _ in results):
        raise UserError("the model's logits are NaN or infinite: the checkpoint is broken")
    return results
