"""Rows of the cache that are refilled while others go on: who gets which, and nobody notices."""

from __future__ import annotations

import math

import pytest

from apps.LT2.inference.continuous_batching import group_by_length
from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from lingua.errors import UserError
from lingua.tokenizer import ByteTokenizer
from tests.LT2.scripted import Scripted
from tests.LT2.tiny import KINDS, tiny_model

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_id
TEXT = "the quick brown fox jumps over the lazy dog, twice"
PROMPTS = [TEXT[i : i + n] for i, n in enumerate([3, 0, 30, 1, 7, 12, 2, 25, 5, 9])]


class EndlessTokenizer(ByteTokenizer):
    def __init__(self):
        super().__init__()
        self.eos_id = -1


def make(model, **options) -> PackedCausalTransformerGenerator:
    cfg = PackedCausalTransformerGeneratorArgs(**{"max_gen_len": 8, "max_tokens": 1000, **options})
    return PackedCausalTransformerGenerator(cfg, model, TOKENIZER)


# ---- who gets which row


def test_a_row_is_refilled_as_soon_as_its_answer_ends():
    model = Scripted([*b"abcde"], [*b"f", EOS], [*b"g", EOS], [EOS], [*b"hij"])
    # Two rows: each of 2 prompt tokens and up to 5 of an answer.
    done = list(make(model, max_gen_len=5, max_tokens=14).complete(["1"] * 5, score=False))
    assert [c.text for c in done] == ["abcde", "f", "g", "", "hij\x00\x00"]
    assert model.prefilled == [[0, 1], [1], [1], [1]]
    # Row 1 says f, EOS; g, EOS; EOS; hij and more, while row 0 ends in the meantime.
    assert model.n_steps == 1 + 1 + 0 + 4


def test_rows_that_end_together_are_refilled_together():
    model = Scripted(*([*b"ab"] for _ in range(5)))
    make(model, max_gen_len=2, max_tokens=8).generate(["1"] * 5)
    assert model.prefilled == [[0, 1], [0, 1], [0]]
    assert model.n_steps == 3


def test_answers_that_end_at_once_take_no_step():
    model = Scripted(*([EOS] for _ in range(7)))
    assert make(model, max_gen_len=6, max_tokens=16).generate(["1"] * 7)[0] == [""] * 7
    assert model.n_steps == 0 and len(model.prefilled) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_break_down_while_decoding_are_refused(bad, temperature, monkeypatch):
    """Any token would be made of them, one outside of the vocabulary, too."""
    model = Scripted([*b"abc"])
    said = model.step

    def step(tokens, cache):
        logits = said(tokens, cache)
        return logits if model.n_steps < 2 else logits.fill_(bad)

    monkeypatch.setattr(model, "step", step)
    with pytest.raises(UserError, match="logits are NaN or infinite.*dtype=fp32"):
        make(model, max_gen_len=5, temperature=temperature).generate(["1"])


def test_nobody_looks_at_the_logits_of_a_free_row(monkeypatch):
    model = Scripted([*b"abcd"], [EOS])
    said = model.step

    def step(tokens, cache):
        logits = said(tokens, cache)
        logits[1] = math.nan
        return logits

    monkeypatch.setattr(model, "step", step)
    assert make(model, max_gen_len=4).generate(["1", "2"])[0] == ["abcd", ""]


def test_one_token_takes_no_step():
    model = Scripted([*b"a"], [*b"b"], [EOS])
    assert make(model, max_gen_len=1).generate(["1"] * 3)[0] == ["a", "b", ""]
    assert model.n_steps == 0


def test_there_are_no_more_rows_than_answers():
    model = Scripted([*b"ab"], [*b"cd"])
    make(model, max_gen_len=2).generate(["1", "2"])
    assert model.prefilled == [[0, 1]]


def test_prompts_are_scored_in_the_rows_that_are_there():
    model = Scripted(*[[0]] * 5)
    scores = make(model, max_gen_len=0, max_tokens=8).generate(["abc"] * 5)[1]
    assert [len(s) for s in scores] == [3] * 5
    assert model.prefilled == [[0, 1], [0, 1], [0]]


@pytest.mark.parametrize(
    "n_slots, max_slots, groups",
    [
        ([], 10, []),
        ([3], 3, [[0]]),
        ([1, 9, 1], 27, [[0, 1, 2]]),  # all fit at once
        ([1, 9, 1], 26, [[0, 2], [1]]),  # a long one does not make rows long for the others
        ([5, 10, 20, 9, 4], 20, [[0, 3], [1, 2], [4]]),  # rows of 9, of 20 and of 4
    ],
)
def test_groups_have_rows_of_alike_lengths(n_slots, max_slots, groups):
    assert group_by_length(n_slots, max_slots) == groups


# ---- and that nobody notices


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_in_any_number_of_rows(kind):
    model = tiny_model(kind, 2)
    # Every fourth byte ends an answer, so that rows come free one by one.
    until = [chr(c) for c in range(0, 128, 4)]
    alone = [next(make(model, until=until).complete([p])).tokens for p in PROMPTS]
    assert len({len(tokens) for tokens in alone}) > 2
    for max_tokens in (40, 90, 1000):  # down to one row, so that all are refilled
        together = make(model, until=until, max_tokens=max_tokens).complete(PROMPTS, score=False)
        assert [c.tokens for c in together] == alone


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_free_for_long_do_no_harm(kind):
    """Three answers in two rows: the second row then runs on for longer than it is."""
    model = tiny_model(kind, 2)
    prompts = [[*b"once"], [*b"upon"], [*b"time"]]
    no_end = make(model, max_gen_len=20, max_tokens=48)
    no_end.tokenizer = EndlessTokenizer()
    got = [c.tokens for c in no_end.complete(prompts)]
    assert [len(tokens) for tokens in got] == [20] * 3
    no_end.cfg.max_tokens = 1000
    assert got == [next(no_end.complete([p])).tokens for p in prompts]


def test_answers_come_in_order_and_their_texts_as_they_grow():
    model = tiny_model("hybrid", 2)
    texts: dict[int, str] = {}
    came: list[int] = []

    def on_text(i: int, new: str) -> None:
        texts[i] = texts.get(i, "") + new
        came.append(i)

    done = list(make(model, max_tokens=60).complete(PROMPTS, on_text=on_text))
    assert [texts.get(i, "") for i in range(len(PROMPTS))] == [c.text for c in done]
    assert came != sorted(came), "no two answers grew at the same time"


def test_characters_that_span_tokens_come_whole_in_every_row():
    scripts = [[*"naïve".encode()], [*"東京".encode()], [*"🙂 ok".encode()]]
    pieces: list[tuple[int, str]] = []
    generator = make(Scripted(*scripts), max_gen_len=7, max_tokens=18)
    generator.cfg.until = ["\x00"]
    done = list(generator.complete(["1"] * 3, on_text=lambda i, text: pieces.append((i, text))))
    assert [c.text for c in done] == ["naïve", "東京", "🙂 ok"]
    assert all("\ufffd" not in text for _, text in pieces)


# ---- samples


def test_samples_depend_on_seed_and_place_and_on_nothing_else():
    model = tiny_model("hybrid", 2)
    options = {"temperature": 1.0, "top_p": 0.95}
    prompts = ["same", *PROMPTS, "same"]
    texts = make(model, **options).generate(prompts)[0]

    assert make(model, **options, max_tokens=60).generate(prompts)[0] == texts
    one_by_one = make(model, **options)
    assert [next(one_by_one.complete([p], places=[i])).text for i, p in enumerate(prompts)] == texts
    assert texts[0] != texts[-1]
    assert make(model, **options, seed=43).generate(prompts)[0] != texts


def test_each_sample_of_a_prompt_has_numbers_of_its_own():
    model = tiny_model("hybrid", 2)
    prompts = PROMPTS[:4]

    def sample(n: int, max_tokens: int) -> list[list[str]]:
        done = make(model, temperature=1.0, max_tokens=max_tokens).complete(prompts, num_samples=n)
        texts = [c.text for c in done]
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    three = sample(3, 1000)
    assert [len(set(texts)) for texts in three] == [3] * len(prompts)
    assert sample(3, 60) == three
    assert sample(2, 100) == [texts[:2] for texts in three]
    assert sample(1, 50) == [texts[:1] for texts in three]


# ---- until


def test_until_may_end_any_row():
    scripts = [[*b"one.two"], [*b"three.four"], [*b"x"], [*b"yy"]]
    generator = make(Scripted(*scripts), max_gen_len=8, max_tokens=20, until=["e.t", ".f"])
    texts = [c.text for c in generator.complete(["1"] * 4)]
    assert texts == ["on", "three", "x" + 7 * "\x00", "yy" + 6 * "\x00"]
