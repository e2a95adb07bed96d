"""One sequence on its way through generation: a prompt, its random numbers and its answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lingua.tokenizer import Tokenizer


@dataclass(eq=False)
class GeneratedSequence:
    prompt: list[int]  # token ids; samples of a prompt hold one list
    max_gen_len: int
    rng: random.Random  # gives one number for each token of the answer
    stream: TextStream  # the answer's text
    tokens: list[int] = field(default_factory=list)  # of the answer
    done: bool = False
    # Scores of the prompt, as Completion has them; empty until somebody wants them.
    loglikelihood: Tensor = field(default_factory=lambda: torch.empty(0))
    greedy: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    @property
    def n_slots(self) -> int:
        """Cache slots that it may need."""
        return len(self.prompt) + self.max_gen_len

    def shares_prompt(self, other: GeneratedSequence) -> bool:
        """Are these samples of one prompt? Prompts that are equal by chance are not."""
        return self.prompt is other.prompt

    def take_scores(self, other: GeneratedSequence) -> None:
        """Those of another sample of the same prompt."""
        self.loglikelihood, self.greedy = other.loglikelihood, other.greedy

    def push(self, token: int, eos_id: int) -> None:
        """One more token of the answer, which may be its last."""
        assert not self.done, "this sequence has ended"
        if self.max_gen_len == 0:  # its prompt's scores are all that it is here for
            self.done = True
            return
        self.tokens.append(token)
        if token != eos_id:
            self.stream.push(token)
        ended = token == eos_id or self.stream.stopped
        self.done = ended or len(self.tokens) == self.max_gen_len
        if self.done:
            self.stream.finish()


UNFINISHED = "\ufffd"  # how decoders show bytes that do not make a character (yet)


class TextStream:
    """The text of one growing sequence, in `text`.

    A character whose last bytes are missing waits for them. `stopped` turns true when a stop string
    has come up, wherever tokens begin and end in it; the text then ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._until = until
        self._tokens: list[int] = []
        # Decoding all tokens at each step would cost the length squared, so only a window of the
        # last ones is decoded. It begins one step early, at a token whose text is out already:
        # some tokenizers treat the first token of a text in a way of its own.
        self._window = 0
        self._settled = 0  # tokens before this one ended in a whole character
        self._n_out = 0  # characters of the window's text that are in `text`
        self._n_taken = 0  # characters of `text` that `take` gave out

    def push(self, token: int) -> None:
        assert not self.stopped, "this sequence has ended"
        self._tokens.append(token)
        window = self._decode_window()
        whole = window.rstrip(UNFINISHED)
        self._grow(whole[self._n_out :])
        if whole == window:
            self._window, self._settled = self._settled, len(self._tokens)
            self._n_out = len(self._decode_window())
        else:
            self._n_out = max(self._n_out, len(whole))

    def finish(self) -> None:
        """No token will come any more: bytes that wait for the rest of their character are shown
        as the tokenizer shows them."""
        if not self.stopped:
            self._grow(self._decode_window()[self._n_out :])
        self._until = ()

    def take(self) -> str:
        """What is new since the last call, but for a tail that may turn out to be a stop string."""
        end = len(self.text) if self.stopped else len(self.text) - self._n_held()
        new = self.text[self._n_taken : end]
        self._n_taken += len(new)
        return new

    def _decode_window(self) -> str:
        return self._tokenizer.decode(self._tokens[self._window :])

    def _grow(self, new: str) -> None:
        before = len(self.text)
        self.text += new
        # A match that ends in the old text would have been found when that was new.
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._until]
        found = [start for start in found if start >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _n_held(self) -> int:
        """Length of the longest end of the text with which some stop string begins."""
        return max(
            (n for s in self._until for n in range(1, len(s)) if self.text.endswith(s[:n])),
            default=0,
        )
