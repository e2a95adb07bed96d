"""Unusual requests in full batches give the same tokens as each sequence alone in a cache."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lingua.errors import UserError
from tests.LT2.inference.generators import UNTIL, make_generator
from tests.LT2.scripted import Scripted
from tests.LT2.tiny import CACHE_KINDS, tiny_model

TEXT = "the quick brown fox jumps over the lazy dog, twice and then once more for good measure"


def together(model, prompts, num_samples: int = 1, **options) -> list[list[int]]:
    done = make_generator(model, **options).complete(prompts, num_samples=num_samples, score=False)
    return [completion.tokens for completion in done]


def one_by_one(model, prompts, num_samples: int = 1, **options) -> list[list[int]]:
    """Without other rows, refilled rows or copied rows."""
    generator, answers = make_generator(model, **options), []
    for place, prompt in enumerate(prompts):
        (tokens,) = generator.prepare([prompt])
        assert isinstance(tokens, list)
        for k in range(num_samples):
            alone = generator._new_sequence(list(tokens), place, k)
            list(generator._run([alone], False))
            answers.append(alone.tokens)
    return answers


def pick(rng: random.Random) -> dict[str, Any]:
    return {
        "temperature": rng.choice([0.0, 1e-6, 5e-324, 0.7, 1.0, 1e308]),
        "top_p": rng.choice([None, 1.0, 1e-12, 0.9]),
        "top_k": rng.choice([None, 1, 5, 258, 10**6]),
        "max_gen_len": rng.choice([0, 1, 2, 8, 12]),
        "until": rng.choice([[], UNTIL, ["ab", "e t"]]),
        "num_samples": rng.choice([1, 1, 2, 7]),
    }


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["window", "hybrid", "gdn+dsa"])
def test_random_options_and_prompts(kind, seed):
    """Empty, long and repeated prompts, in few and many rows."""
    rng, model = random.Random(f"{kind} {seed}"), tiny_model(kind, 1)
    prompts = [TEXT[i : i + rng.choice([0, 1, 2, 5, 40, 80])] for i in rng.sample(range(40), 4)]
    prompts += prompts[: rng.randint(0, 2)]
    options = pick(rng)
    want = one_by_one(model, prompts, **options)
    assert together(model, prompts, **options, max_tokens=rng.choice([100, 130, 250])) == want


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_one_long_prompt_among_short_ones(kind):
    model = tiny_model(kind, 1)
    prompts = ["a", "b", TEXT, "", "c", "", "a", "b"]
    want = one_by_one(model, prompts, until=UNTIL)
    for max_tokens in (len(TEXT) + 9, 1000):
        assert together(model, prompts, until=UNTIL, max_tokens=max_tokens) == want


def test_extreme_sampling_options_equal_their_limits():
    model = tiny_model("hybrid", 1)
    prompts = ["once", "upon", "a time"]
    greedy = together(model, prompts)
    for options in ({"temperature": 5e-324}, {"temperature": 1.0, "top_p": 5e-324}, {"top_k": 1}):
        assert together(model, prompts, **{"temperature": 1.0, **options}) == greedy
    free = together(model, prompts, temperature=1.0)
    assert free != greedy
    # No limit, but the tokens are sorted by probability.
    every = together(model, prompts, temperature=1.0, top_k=258)
    for options in ({"top_k": 10**9}, {"top_p": 1.0}):
        assert together(model, prompts, temperature=1.0, **options) == every


def test_more_prompts_and_samples_than_rows():
    model = tiny_model("hybrid", 1)
    prompts = ["once", "upon", "once"]
    want = one_by_one(model, prompts, 5, temperature=1.0, until=UNTIL)
    assert len({tuple(tokens) for tokens in want}) > 12
    for room in (13, 26, 39):
        got = together(model, prompts, 5, temperature=1.0, until=UNTIL, max_tokens=room)
        assert got == want


def test_a_too_long_prompt_is_reported_before_anything_runs():
    model = Scripted()  # fails if it is called
    with pytest.raises(UserError, match=r"prompt 2 of 3.*max_tokens=39"):
        list(make_generator(model, max_tokens=30).complete(["a", "x" * 30, "b"], num_samples=4))
