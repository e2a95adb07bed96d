"""Decoding token by token gives the text of all tokens, up to the first stop string."""

from __future__ import annotations

import random

import pytest

from apps.LT2.inference.sequence import TextStream
from lingua.tokenizer import ByteTokenizer
from tests.lingua.tokenizer_kinds import TOKENIZER_KINDS, make_tokenizer

TOKENIZER = ByteTokenizer()
WORLD = "naïve 東京 🙂 ok\n\nend"


class WordTokenizer(ByteTokenizer):
    """Like SentencePiece: tokens start with a space, which is dropped at the start of a text."""

    WORDS = [" a", " stop", "s", " here", "."]

    def decode(self, tokens):
        return "".join(self.WORDS[t] for t in tokens).removeprefix(" ")


def stream_all(stream: TextStream, tokens) -> list[str]:
    """Return the results of `take` after each token and at the end."""
    texts = []
    for token in tokens:
        stream.push(token)
        texts.append(stream.take())
        if stream.stopped:
            break
    stream.finish()
    return [*texts, stream.take()]


def test_characters_are_complete_and_not_delayed():
    stream = TextStream(TOKENIZER)
    texts = stream_all(stream, WORLD.encode())
    assert "".join(texts) == stream.text == WORLD
    assert [text for text in texts if text] == list(WORLD)


@pytest.mark.parametrize("seed", range(20))
def test_invalid_bytes_decode_as_the_tokenizer_decodes_them(seed):
    rng = random.Random(seed)
    pool = [*WORLD.encode(), 0xFF, 0xE2, 0x80, 256, 300]
    tokens = [rng.choice(pool) for _ in range(60)]
    stream = TextStream(TOKENIZER)
    assert "".join(stream_all(stream, tokens)) == stream.text == TOKENIZER.decode(tokens)


def test_an_incomplete_character_is_shown_at_the_end():
    stream = TextStream(TOKENIZER)
    *during, last = stream_all(stream, "a🙂".encode()[:-1])
    assert "".join(during) == "a" and last == "\ufffd"


def test_spaces_between_words_are_kept():
    stream = TextStream(WordTokenizer(), until=["stops."])
    assert stream_all(stream, [0, 1, 2, 3, 0]) == ["a", " ", "", "stops here", " a", ""]


def test_the_start_of_a_stop_string_is_held_back():
    stream = TextStream(TOKENIZER, until=["\n\n"])
    assert stream_all(stream, b"a\nb\n\nc") == ["a", "", "\nb", "", "", ""]
    assert stream.stopped and stream.text == "a\nb"


def test_held_text_is_released_at_the_end():
    stream = TextStream(TOKENIZER, until=["end!"])
    assert "".join(stream_all(stream, b"the end")) == stream.text == "the end"
    assert not stream.stopped


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_string_is_found_anywhere(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab🙂") for _ in range(40))
    until = ["".join(rng.choice("ab🙂") for _ in range(n)) for n in (3, 4, 5)]
    stream = TextStream(TOKENIZER, until)
    shown = "".join(stream_all(stream, text.encode()))
    ends = [(text.index(s) + len(s), text.index(s)) for s in until if s in text]
    first_end = min(ends, default=(0, len(text)))[0]
    starts = [start for end, start in ends if end == first_end]
    assert shown == stream.text == text[: min(starts, default=len(text))]
    assert stream.stopped == bool(ends)


def test_decoding_cost_does_not_grow_with_the_text():
    class Counting(ByteTokenizer):
        longest = 0

        def decode(self, tokens):
            self.longest = max(self.longest, len(tokens))
            return super().decode(tokens)

    tokenizer = Counting()
    stream_all(TextStream(tokenizer), WORLD.encode() * 50)
    assert tokenizer.longest <= 16


PROMPTS = ["The function returns", "the", "naïve 東京", "a\ufffd", "x\n", " ", ""]


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_prompt_and_answer_are_their_decoded_tokens(kind):
    tokenizer = make_tokenizer(kind)
    for seed in range(60):
        rng = random.Random(seed)
        text = rng.choice(PROMPTS)
        prompt = tokenizer.encode(text, tokenizer.bos_id >= 0 and seed % 2 == 0, False)
        if seed % 3:  # any tokens: invalid bytes, specials, blanks
            answer = [rng.randrange(tokenizer.n_words) for _ in range(20)]
        else:
            answer = tokenizer.encode(" ".join(rng.choices(PROMPTS, k=3)), False, False)
        stream = TextStream(tokenizer, prompt=prompt)
        shown = "".join(stream_all(stream, answer))
        assert tokenizer.decode(prompt) + shown == tokenizer.decode(prompt + answer)
        assert shown == stream.text


@pytest.mark.parametrize("kind", ["sp-bpe", "byte-fallback", "wordpiece", "metaspace"])
def test_stop_strings_see_the_blank_before_the_answer(kind):
    tokenizer = make_tokenizer(kind)
    prompt, answer = (tokenizer.encode(text, False, False) for text in ("the", "the returns"))
    stream = TextStream(tokenizer, [" re"], prompt)
    assert "".join(stream_all(stream, answer)) == stream.text == " the" and stream.stopped
    stream = TextStream(tokenizer, [" the"], prompt)
    assert stream_all(stream, answer)[-1] == stream.text == "" and stream.stopped


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_a_stop_string_contains_no_text_of_the_prompt(kind):
    tokenizer = make_tokenizer(kind)
    prompt, answer = (tokenizer.encode(text, False, False) for text in ("the", "return"))
    want = tokenizer.decode(prompt + answer)[3:]
    stream = TextStream(tokenizer, ["the", "e r", "er", "ther"], prompt)
    assert "".join(stream_all(stream, answer)) == want and not stream.stopped


def test_a_prompt_may_end_in_tokens_without_text():
    tokenizer = make_tokenizer("sp-bpe")
    prompt = tokenizer.encode("the", False, False) + [tokenizer.eos_id] * 20
    stream = TextStream(tokenizer, prompt=prompt)
    assert "".join(stream_all(stream, tokenizer.encode("the", False, False))) == " the"


def test_a_character_may_start_in_the_prompt():
    first, *rest = "東".encode()
    stream = TextStream(TOKENIZER, prompt=[*b"a", first])
    assert stream_all(stream, [*rest, *b"!"]) == ["", "東", "!", ""]
    stream = TextStream(TOKENIZER, prompt=[*b"a", first])
    assert "".join(stream_all(stream, b"b")) == "b"
