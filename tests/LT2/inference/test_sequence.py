"""Decoding token by token gives the text of all tokens, up to the first stop string."""

from __future__ import annotations

import random

import pytest

from apps.LT2.inference.sequence import TextStream
from lingua.tokenizer import ByteTokenizer

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
