"""Samples start from copies of their prompt's row, which doesn't change the answers."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.inference.sequence import GeneratedSequence
from lingua.errors import UserError
from tests.LT2.inference.generators import EOS, UNTIL, make_generator
from tests.LT2.scripted import Scripted
from tests.LT2.tiny import CACHE_KINDS, KINDS, tiny_model
from tests.tolerances import FP32, assert_same

PROMPTS = ["the quick brown", "", "fox", "jumps over the lazy dog"]


class Calls:
    """Records the prefills and caches of a model."""

    def __init__(self, model, monkeypatch):
        self.lengths: list[int] = []  # of the prefilled prompts
        self.batch_sizes: list[int] = []  # of the caches
        prefill, init_cache = model.prefill, model.init_cache

        def watch_prefill(tokens, cache, *, cu_seqlens, **options):
            self.lengths += cu_seqlens.diff().tolist()
            return prefill(tokens, cache, cu_seqlens=cu_seqlens, **options)

        def watch_init_cache(batch_size, **options):
            self.batch_sizes.append(batch_size)
            return init_cache(batch_size, **options)

        monkeypatch.setattr(model, "prefill", watch_prefill)
        monkeypatch.setattr(model, "init_cache", watch_init_cache)


# ---- the rows


@pytest.mark.parametrize("kind", KINDS)
def test_every_copy_of_a_row_continues_the_same_sequence(kind):
    """In the same cache and in another one; the copied row can be reused."""
    model = tiny_model(kind, 2)
    tokens = torch.randint(258, (2, 9), generator=torch.Generator().manual_seed(0))
    nexts = torch.randint(258, (12, 1), generator=torch.Generator().manual_seed(1))
    cache, other = model.init_cache(3, 24), model.init_cache(1, 24)
    model.prefill(tokens, cache, rows=[0, 1])
    other.copy_rows([0], cache, [1])
    cache.reset([0])
    cache.copy_rows([2, 0], cache, [1, 1])
    assert cache.lengths == [9, 9, 9] and other.lengths == [9]
    want = torch.cat([model.step(token[:, None], other) for token in nexts])
    got = torch.cat([model.step(token.expand(3, 1), cache) for token in nexts], dim=1)
    for row in range(3):
        assert_same(got[row], want[:, 0], FP32, f"row {row}")
    # Rows are copies, not views.
    cache.reset([1])
    other.copy_rows([0], cache, [0])
    a = model.step(nexts[:1].expand(3, 1), cache)
    assert_same(a[0], model.step(nexts[:1], other)[0], FP32)
    assert not torch.allclose(a[0], a[1], atol=1e-3)


# ---- the answers


@pytest.mark.parametrize(
    "kind, temperature", [(kind, 1.0) for kind in CACHE_KINDS] + [("hybrid", 0.0)]
)
def test_shared_prefill_does_not_change_the_answers(kind, temperature, monkeypatch):
    model = tiny_model(kind, 1)

    def answers(max_tokens: int) -> list[list[int]]:
        generator = make_generator(
            model, temperature=temperature, until=UNTIL, max_tokens=max_tokens
        )
        return [c.tokens for c in generator.complete(PROMPTS, num_samples=4, score=False)]

    shared = [answers(max_tokens) for max_tokens in (1000, 70, 33)]  # 16, 2 and 1 rows
    monkeypatch.setattr(GeneratedSequence, "shares_prompt", lambda self, other: False)
    assert shared == [answers(1000)] * 3
    if temperature:
        assert len({tuple(tokens) for tokens in shared[0]}) > 12


SIMILAR = ["the quick", "brown fox", "jumps"]  # of similar length, so they share a cache


@pytest.mark.parametrize("max_tokens, rows", [(1000, 15), (76, 4), (40, 2), (20, 1)])
@pytest.mark.parametrize("score", [False, True])
def test_a_prompt_is_prefilled_once(max_tokens, rows, score, monkeypatch):
    model = tiny_model("hybrid", 2)
    alone = [next(make_generator(model).complete([p])) for p in SIMILAR]
    calls = Calls(model, monkeypatch)
    generator = make_generator(model, temperature=1.0, until=UNTIL, max_tokens=max_tokens)
    done = list(generator.complete(SIMILAR, num_samples=5, score=score))
    assert calls.lengths == [len(prompt) + 1 for prompt in SIMILAR]
    # One extra row, unless all samples start together.
    assert calls.batch_sizes[0] == rows and calls.batch_sizes[1:] in ([], [1])
    assert (calls.batch_sizes[1:] == []) == (rows == 15)
    for i, completion in enumerate(done):
        want = alone[i // 5].loglikelihood if score else torch.empty(0)
        torch.testing.assert_close(completion.loglikelihood, want)
        assert len(completion.greedy) == len(want)


def test_no_prompt_is_kept_for_one_sample(monkeypatch):
    model = tiny_model("gdn", 1)
    calls = Calls(model, monkeypatch)
    list(make_generator(model, max_tokens=40).complete(SIMILAR))
    assert calls.batch_sizes == [2]


def test_equal_prompts_in_a_list_are_separate(monkeypatch):
    """Each has its own place, and so its own random numbers."""
    model = tiny_model("gdn", 1)
    calls = Calls(model, monkeypatch)
    generator = make_generator(model, temperature=1.0)
    texts = [c.text for c in generator.complete(["same", "same"], num_samples=2)]
    assert len(set(texts)) == 4
    assert calls.lengths == [5, 5]


def test_samples_without_an_answer_are_scored(monkeypatch):
    model = tiny_model("hybrid", 1)
    calls = Calls(model, monkeypatch)
    done = list(
        make_generator(model, max_gen_len=0, max_tokens=16).complete(["abc", "de"], num_samples=9)
    )
    assert [len(c.loglikelihood) for c in done] == [3] * 9 + [2] * 9
    assert calls.lengths == [4, 3]


# ---- NaN and infinite logits


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}]
)
@pytest.mark.parametrize("at", ["prefill", "step"])
def test_one_bad_logit_is_an_error(bad, options, at, monkeypatch):
    model = Scripted([*b"abc"], [*b"def"])
    call = getattr(model, at)

    def spoil(*args, **kwargs):
        logits = call(*args, **kwargs)
        logits[-1, -1, 257] = bad  # one token of one sequence
        return logits

    monkeypatch.setattr(model, at, spoil)
    generator = make_generator(model, max_gen_len=5, **options)
    texts: list[str] = []
    with pytest.raises(UserError, match="NaN.*dtype=fp32"):
        list(generator.complete(["1", "2"], score=False, on_text=lambda i, new: texts.append(new)))
    assert "".join(texts) == ("" if at == "prefill" else "ad"), "text of a broken step"


def test_free_rows_may_have_nan_logits(monkeypatch):
    """Their tokens stay inside the vocabulary, as they are the next input."""
    model = Scripted([*b"abcd"], [EOS])
    call = model.step

    def step(tokens, cache):
        assert int(tokens.min()) >= 0 and int(tokens.max()) < 258
        logits = call(tokens, cache)
        logits[1] = float("nan")
        return logits

    monkeypatch.setattr(model, "step", step)
    for options in ({}, {"temperature": 1e-6}, {"temperature": 1e-6, "top_k": 9, "top_p": 0.9}):
        model.waiting = [[*b"abcd"], [EOS]]
        texts = make_generator(model, max_gen_len=4, **options).generate(["1", "2"])[0]
        assert texts == ["abcd", ""]
