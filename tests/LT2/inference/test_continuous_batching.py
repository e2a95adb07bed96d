"""Continuous batching refills rows at once, and doesn't change the answers."""

from __future__ import annotations

import pytest

from apps.LT2.inference.continuous_batching import group_by_length
from tests.LT2.inference.generators import EOS, UNTIL, EndlessTokenizer, make_generator
from tests.LT2.scripted import Scripted
from tests.LT2.tiny import CACHE_KINDS, tiny_model

TEXT = "the quick brown fox jumps over the lazy dog, twice"
PROMPTS = [TEXT[i : i + n] for i, n in enumerate([3, 0, 30, 1, 7, 12, 2, 25, 5, 9])]


# ---- the order of rows


def test_a_row_is_refilled_as_soon_as_its_answer_ends():
    model = Scripted([*b"abcde"], [*b"f", EOS], [*b"g", EOS], [EOS], [*b"hij"])
    # Two rows of 7 slots: BOS and 1, and 5 answer tokens.
    done = list(
        make_generator(model, max_gen_len=5, max_tokens=14).complete(["1"] * 5, score=False)
    )
    assert [c.text for c in done] == ["abcde", "f", "g", "", "hij\x00\x00"]
    assert model.prefilled == [[0, 1], [1], [1], [1]]
    # Row 1 generates f, EOS; g, EOS; EOS; hij and padding. Row 0 ends meanwhile.
    assert model.n_steps == 1 + 1 + 0 + 4


def test_rows_that_end_together_are_refilled_together():
    model = Scripted(*([*b"ab"] for _ in range(5)))
    make_generator(model, max_gen_len=2, max_tokens=8).generate(["1"] * 5)
    assert model.prefilled == [[0, 1], [0, 1], [0]]
    assert model.n_steps == 3


def test_answers_that_end_at_once_take_no_step():
    model = Scripted(*([EOS] for _ in range(7)))
    assert make_generator(model, max_gen_len=6, max_tokens=16).generate(["1"] * 7)[0] == [""] * 7
    assert model.n_steps == 0 and len(model.prefilled) == 4


def test_one_token_takes_no_step():
    model = Scripted([*b"a"], [*b"b"], [EOS])
    assert make_generator(model, max_gen_len=1).generate(["1"] * 3)[0] == ["a", "b", ""]
    assert model.n_steps == 0


def test_cache_has_no_more_rows_than_answers():
    model = Scripted([*b"ab"], [*b"cd"])
    make_generator(model, max_gen_len=2).generate(["1", "2"])
    assert model.prefilled == [[0, 1]]


def test_scoring_reuses_rows():
    model = Scripted(*[[0]] * 5)
    scores = make_generator(model, max_gen_len=0, max_tokens=8).generate(["abc"] * 5)[1]
    assert [len(s) for s in scores] == [3] * 5
    assert model.prefilled == [[0, 1], [0, 1], [0]]


@pytest.mark.parametrize(
    "n_slots, max_slots, groups",
    [
        ([], 10, []),
        ([3], 3, [[0]]),
        ([1, 9, 1], 27, [[0, 1, 2]]),  # all fit at once
        ([1, 9, 1], 26, [[0, 2], [1]]),  # the long one gets a separate cache
        ([5, 10, 20, 9, 4], 20, [[0, 3], [1, 2], [4]]),  # rows of 9, 20 and 4 slots
    ],
)
def test_groups_have_similar_lengths(n_slots, max_slots, groups):
    assert group_by_length(n_slots, max_slots) == groups


# ---- the answers


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_answers_do_not_depend_on_the_number_of_rows(kind):
    model = tiny_model(kind, 2)
    alone = [next(make_generator(model, until=UNTIL).complete([p])).tokens for p in PROMPTS]
    assert len({len(tokens) for tokens in alone}) > 2
    for max_tokens in (40, 90):  # down to one row
        together = make_generator(model, until=UNTIL, max_tokens=max_tokens).complete(
            PROMPTS, score=False
        )
        assert [c.tokens for c in together] == alone


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_free_rows_do_not_disturb_active_ones(kind):
    """Three answers in two rows: the free second row runs past its end."""
    model = tiny_model(kind, 2)
    prompts = [[*b"once"], [*b"upon"], [*b"time"]]
    no_end = make_generator(model, max_gen_len=12, max_tokens=32)
    no_end.tokenizer = EndlessTokenizer()
    got = [c.tokens for c in no_end.complete(prompts)]
    assert [len(tokens) for tokens in got] == [12] * 3
    no_end.cfg.max_tokens = 1000
    assert got == [next(no_end.complete([p])).tokens for p in prompts]


def test_answers_are_ordered_and_texts_are_streamed():
    model = tiny_model("hybrid", 2)
    texts: dict[int, str] = {}
    order: list[int] = []

    def on_text(i: int, new: str) -> None:
        texts[i] = texts.get(i, "") + new
        order.append(i)

    done = list(make_generator(model, max_tokens=60).complete(PROMPTS, on_text=on_text))
    assert [texts.get(i, "") for i in range(len(PROMPTS))] == [c.text for c in done]
    assert order != sorted(order), "no two answers were streamed at the same time"


def test_characters_that_span_tokens_are_complete_in_every_row():
    scripts = [[*"naïve".encode()], [*"東京".encode()], [*"🙂 ok".encode()]]
    texts: list[tuple[int, str]] = []
    generator = make_generator(Scripted(*scripts), max_gen_len=7, max_tokens=18)
    generator.cfg.until = ["\x00"]
    done = list(generator.complete(["1"] * 3, on_text=lambda i, text: texts.append((i, text))))
    assert [c.text for c in done] == ["naïve", "東京", "🙂 ok"]
    assert all("\ufffd" not in text for _, text in texts)


# ---- samples


def test_samples_depend_only_on_seed_and_place():
    model = tiny_model("hybrid", 2)
    options = {"temperature": 1.0, "top_p": 0.95}
    prompts = ["same", *PROMPTS, "same"]
    texts = make_generator(model, **options).generate(prompts)[0]

    assert make_generator(model, **options, max_tokens=60).generate(prompts)[0] == texts
    one_by_one = make_generator(model, **options)
    assert [next(one_by_one.complete([p], places=[i])).text for i, p in enumerate(prompts)] == texts
    assert texts[0] != texts[-1]
    assert make_generator(model, **options, seed=43).generate(prompts)[0] != texts


def test_samples_of_a_prompt_have_separate_random_numbers():
    model = tiny_model("hybrid", 2)
    prompts = PROMPTS[:4]

    def sample(n: int, max_tokens: int) -> list[list[str]]:
        done = make_generator(model, temperature=1.0, max_tokens=max_tokens).complete(
            prompts, num_samples=n
        )
        texts = [c.text for c in done]
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    three = sample(3, 1000)
    assert [len(set(texts)) for texts in three] == [3] * len(prompts)
    assert sample(3, 60) == three
    assert sample(2, 100) == [texts[:2] for texts in three]
    assert sample(1, 50) == [texts[:1] for texts in three]


def test_until_ends_any_row():
    scripts = [[*b"one.two"], [*b"three.four"], [*b"x"], [*b"yy"]]
    generator = make_generator(
        Scripted(*scripts), max_gen_len=8, max_tokens=20, until=["e.t", ".f"]
    )
    texts = [c.text for c in generator.complete(["1"] * 4)]
    assert texts == ["on", "three", "x" + 7 * "\x00", "yy" + 6 * "\x00"]
