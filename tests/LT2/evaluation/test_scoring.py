"""Packed, windowed log-likelihoods against a direct forward for each request."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.evaluation import scoring
from apps.LT2.evaluation.scoring import (
    EvaluationStopped,
    cut_windows,
    pack_windows,
    score_continuations,
)
from lingua.errors import UserError
from tests.lingua.dist_utils import run_ranks
from tests.LT2.tiny import KINDS, tiny_model

MAX_LEN = 12
TOKENS = list(b"the quick brown fox jumps over the lazy dog and once more over it")
# (length of the context, length of the continuation)
SHAPES = [(1, 1), (5, 3), (9, 4), (10, 4), (40, 2), (40, 12), (1, 12), (3, 13), (7, 31), (4, 0)]
REQUESTS = [(TOKENS[i : i + n], TOKENS[i + n : i + n + m]) for i, (n, m) in enumerate(SHAPES)]


@torch.no_grad()
def direct(model, context, continuation, max_len=MAX_LEN, stride=None) -> tuple[float, bool]:
    """Score by definition: each window with as many preceding tokens as fit."""
    tokens, n = context + continuation, len(context)
    total, greedy, done = 0.0, True, 0
    while done < len(continuation):
        end = min(done + (max_len if done == 0 or stride is None else stride), len(continuation))
        read = tokens[max(0, n + end - 1 - max_len) : n + end - 1]
        logits = model(torch.tensor([read]))[0, -(end - done) :]
        targets = torch.tensor(continuation[done:end])
        logp = logits.double().log_softmax(-1)
        total += logp[torch.arange(end - done), targets].sum().item()
        greedy &= bool((logits.argmax(-1) == targets).all())
        done = end
    return total, greedy


def score(model, requests=REQUESTS, **options):
    return score_continuations(model, requests, **{"max_len": MAX_LEN, "max_tokens": 40, **options})


def assert_scores(got, want):
    assert [g for _, g in got] == [g for _, g in want]
    assert [s for s, _ in got] == pytest.approx([s for s, _ in want], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [None, 5])
def test_scores_match_a_direct_forward(kind, stride):
    model = tiny_model(kind, 2)
    want = [direct(model, *request, stride=stride) for request in REQUESTS]
    assert_scores(score(model, stride=stride), want)


def test_the_flag_marks_greedy_answers():
    model = tiny_model("hybrid", 2)
    context, answer = TOKENS[:5], []
    for _ in range(6):
        answer.append(int(model(torch.tensor([context + answer]))[0, -1].argmax()))
    wrong = [*answer[:-1], (answer[-1] + 1) % 258]
    assert [g for _, g in score(model, [(context, answer), (context, wrong)])] == [True, False]


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_scores_do_not_depend_on_batches(max_tokens):
    model = tiny_model("hybrid", 2)
    assert_scores(score(model, max_tokens=max_tokens), [direct(model, *r) for r in REQUESTS])


def test_scores_do_not_depend_on_logits_at_once(monkeypatch):
    model = tiny_model("full", 1)
    want = score(model)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 258 * 3)
    assert_scores(score(model), want)


@pytest.mark.parametrize("stride", [None, 1, 4, 100])
def test_every_token_is_scored_once_and_windows_fit(stride):
    for context, continuation in REQUESTS:
        windows = list(cut_windows(0, context, continuation, MAX_LEN, stride))
        assert sum(w.n_targets for w in windows) == len(continuation)
        scored = [t for w in windows for t in w.tokens[len(w.tokens) - w.n_targets :]]
        assert scored == continuation
        assert all(w.n_targets < len(w.tokens) <= MAX_LEN + 1 for w in windows)
        done = 0
        for window in windows:  # the context fills the window
            done += window.n_targets
            assert len(window.tokens) == min(MAX_LEN + 1, len(context) + done)


def test_batches_hold_all_windows_and_fit():
    windows = [w for r in REQUESTS for w in cut_windows(0, *r, MAX_LEN)]
    batches = pack_windows(windows, 30)
    assert sorted(map(id, windows)) == sorted(id(w) for batch in batches for w in batch)
    sizes = [sum(len(w.tokens) - 1 for w in batch) for batch in batches]
    assert max(sizes) <= 30 and len(sizes) <= 2 * sum(sizes) / 30
    lengths = [len(w.tokens) for batch in batches for w in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_nan_logits_are_a_user_error():
    model = tiny_model("full", 1)
    model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        score(model)


def score_on_rank(rank, world_size):
    torch.set_num_threads(1)
    model = tiny_model("hybrid", 2)
    scores = score(model)
    scores_of_one = score(model, REQUESTS[:1])  # fewer batches than ranks
    calls = []

    def stop_on_rank_1():
        calls.append(rank)
        return rank == 1

    stopped = failed = False
    try:
        score(model, should_stop=stop_on_rank_1)
    except EvaluationStopped:
        stopped = True
    if rank == 1:
        model.norm.weight[0] = float("nan")
    try:
        score(model)
    except UserError:
        failed = True
    return scores, scores_of_one, stopped, len(calls), failed


def test_ranks_share_the_batches_and_give_bitwise_equal_scores():
    want = score(tiny_model("hybrid", 2))
    results = run_ranks(2, score_on_rank)
    n_batches = len(pack_windows((w for r in REQUESTS for w in cut_windows(0, *r, MAX_LEN)), 40))
    assert n_batches > 2
    for scores, scores_of_one, stopped, _, failed in results:
        assert scores == want
        assert_scores(scores_of_one, want[:1])
        assert stopped and failed, "an error or a stop on one rank reaches all"
    assert [calls for *_, calls, _ in results] == [(n_batches + 1) // 2, 1]


@pytest.mark.parametrize("strange", [-1, 258])
def test_a_token_outside_the_vocabulary_is_a_user_error(strange):
    message = f"token {strange} .*model.vocab_size=258"
    for request in (([1, strange], [2]), ([1], [2, strange])):
        with pytest.raises(UserError, match=message):
            score(tiny_model("hybrid", 2), [*REQUESTS, request])
