"""Odd requests in crowded batches, each against the same sequence alone in a cache."""

from __future__ import annotations

import random
from typing import Any

import pytest

from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from lingua.errors import UserError
from lingua.tokenizer import ByteTokenizer
from tests.LT2.scripted import Scripted
from tests.LT2.tiny import KINDS, tiny_model

TOKENIZER = ByteTokenizer()
TEXT = "the quick brown fox jumps over the lazy dog, twice and then once more for good measure"
UNTIL = [chr(c) for c in range(0, 128, 4)]


def make(model, **options) -> PackedCausalTransformerGenerator:
    cfg = PackedCausalTransformerGeneratorArgs(**{"max_gen_len": 8, "max_tokens": 1000, **options})
    return PackedCausalTransformerGenerator(cfg, model, TOKENIZER)


def together(model, prompts, num_samples: int = 1, **options) -> list[list[int]]:
    done = make(model, **options).complete(prompts, num_samples=num_samples, score=False)
    return [completion.tokens for completion in done]


def one_by_one(model, prompts, num_samples: int = 1, **options) -> list[list[int]]:
    """No other row, no refilled row, no row that was copied."""
    generator, answers = make(model, **options), []
    for place, prompt in enumerate(prompts):
        (tokens,) = generator.prepare([prompt])
        assert isinstance(tokens, list)
        for k in range(num_samples):
            alone = generator._new_sequence(list(tokens), place, k)
            answers += [done.tokens for done in generator._report([alone], None, False)]
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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["window", "hybrid", "gdn+dsa"])
def test_any_mixture_of_options_and_prompts(kind, seed):
    """Empty prompts and long ones, some twice, in few rows and in many."""
    rng, model = random.Random(f"{kind} {seed}"), tiny_model(kind, 1)
    prompts = [TEXT[i : i + rng.choice([0, 1, 2, 5, 40, 80])] for i in rng.sample(range(40), 4)]
    prompts += prompts[: rng.randint(0, 2)]
    options = pick(rng)
    want = one_by_one(model, prompts, **options)
    assert together(model, prompts, **options, max_tokens=rng.choice([100, 130, 250])) == want


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_among_many_short_ones(kind):
    model = tiny_model(kind, 1)
    prompts = ["a", "b", TEXT, "", "c", "", "a", "b"]
    want = one_by_one(model, prompts, until=UNTIL)
    for max_tokens in (len(TEXT) + 9, 1000):
        assert together(model, prompts, until=UNTIL, max_tokens=max_tokens) == want


def test_extreme_sampling_is_what_it_tends_to():
    model = tiny_model("hybrid", 1)
    prompts = ["once", "upon", "a time"]
    greedy = together(model, prompts)
    for options in ({"temperature": 5e-324}, {"temperature": 1.0, "top_p": 5e-324}, {"top_k": 1}):
        assert together(model, prompts, **{"temperature": 1.0, **options}) == greedy
    free = together(model, prompts, temperature=1.0)
    assert free != greedy
    # No limit, and random numbers that pick among tokens sorted by probability.
    every = together(model, prompts, temperature=1.0, top_k=258)
    for options in ({"top_k": 10**9}, {"top_p": 1.0}):
        assert together(model, prompts, temperature=1.0, **options) == every


def test_rows_that_all_end_at_once_are_all_refilled_at_once():
    scripts = [[*b"ab", TOKENIZER.eos_id]] * 9
    model = Scripted(*scripts)
    texts = make(model, max_gen_len=6, max_tokens=24).generate(["1"] * 9)[0]
    assert texts == ["ab"] * 9
    assert model.prefilled == [[0, 1, 2]] * 3 and model.n_steps == 6


def test_more_samples_than_rows_of_more_prompts_than_rows():
    model = tiny_model("hybrid", 1)
    prompts = ["once", "upon", "once"]
    want = one_by_one(model, prompts, 5, temperature=1.0, until=UNTIL)
    assert len({tuple(tokens) for tokens in want}) > 12
    for room in (13, 26, 39):
        got = together(model, prompts, 5, temperature=1.0, until=UNTIL, max_tokens=room)
        assert got == want


def test_a_prompt_that_is_too_long_is_named_before_any_sample_of_another_runs():
    model = Scripted()  # which has nothing to say
    with pytest.raises(UserError, match=r"prompt 2 of 3: it has 31 tokens.*set max_tokens=39"):
        list(make(model, max_tokens=30).complete(["a", "x" * 30, "b"], num_samples=4))
