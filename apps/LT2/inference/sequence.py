"""One sequence during generation: its prompt, its random numbers and its answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lingua.tokenizer import Tokenizer


@dataclass(eq=False)
class GeneratedSequence:
    prompt: list[int]  # token ids; samples of a prompt share one list object
    max_gen_len: int
    rng: random.Random  # one number for each token of the answer
    stream: TextStream  # the answer's text
    tokens: list[int] = field(default_factory=list)  # of the answer
    done: bool = False
    # The prompt's (loglikelihood, greedy), see Completion; empty if not scored.
    scores: tuple[Tensor, Tensor] = field(
        default_factory=lambda: (torch.empty(0), torch.empty(0, dtype=torch.bool))
    )

    @property
    def n_slots(self) -> int:
        """Cache slots for the prompt and the longest answer."""
        return len(self.prompt) + self.max_gen_len

    def shares_prompt(self, other: GeneratedSequence) -> bool:
        """Return whether both are samples of one prompt; equal texts are separate prompts."""
        return self.prompt is other.prompt

    def push(self, token: int, eos_id: int) -> None:
        """Append a token to the answer, and end the answer if it is the last one."""
        assert not self.done, "this sequence has ended"
        if self.max_gen_len > 0:  # else only the prompt's scores are wanted
            self.tokens.append(token)
            if token != eos_id:
                self.stream.push(token)
        ended = token == eos_id or self.stream.stopped
        self.done = ended or len(self.tokens) == self.max_gen_len
        if self.done:
            self.stream.finish()


UNFINISHED = "\ufffd"  # what decoders return for an incomplete character
CONTEXT = 8  # tokens of the prompt that are decoded with the answer


class TextStream:
    """Decode an answer into `text`, and stop at the first stop string.

    The decoded prompt followed by `text` is the decoded prompt and answer. An incomplete character
    waits for its last bytes. A stop string may span tokens, but contains no text of the prompt. It
    sets `stopped`, and the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._until = until
        self._tokens = last_tokens(tokenizer, prompt)
        # Decoding all tokens at each step would be quadratic, so only a window of the last tokens
        # is decoded. It starts with tokens that are in the prompt or in `text` already, because
        # many tokenizers decode the first token of a text differently.
        self._window = 0  # index of its first token
        self._settled = len(self._tokens)  # tokens before this index end in a complete character
        self._shown = self._decode(0)  # text of the window that is in the prompt or in `text`
        self._n_taken = 0  # characters of `text` that `take` returned

    def push(self, token: int) -> None:
        assert not self.stopped, "this sequence has ended"
        self._tokens.append(token)
        window = self._decode(self._window)
        whole = window.rstrip(UNFINISHED)
        n_shown = self._n_shown(window)
        self._grow(whole[n_shown:])
        if whole == window:
            # A window without text would not show that its next token isn't the first.
            if rest := self._decode(self._settled):
                self._window, self._shown = self._settled, rest
            else:
                self._shown = window
            self._settled = len(self._tokens)
        else:
            self._shown = window[: max(n_shown, len(whole))]

    def finish(self) -> None:
        """End the text; an incomplete character is decoded as the tokenizer decodes it."""
        if not self.stopped:
            window = self._decode(self._window)
            self._grow(window[self._n_shown(window) :])
        self._until = ()

    def take(self) -> str:
        """Return the text since the last call, without an end that may become a stop string."""
        end = len(self.text) if self.stopped else len(self.text) - self._n_held()
        new = self.text[self._n_taken : end]
        self._n_taken += len(new)
        return new

    def _decode(self, start: int) -> str:
        return self._tokenizer.decode(self._tokens[start:])

    def _n_shown(self, window: str) -> int:
        """Return the length of the part of the window that is shown already.

        The prompt may end in U+FFFD: as a character, or for an incomplete one that is now complete.
        """
        is_prefix = window.startswith(self._shown)
        return len(self._shown if is_prefix else self._shown.rstrip(UNFINISHED))

    def _grow(self, new: str) -> None:
        before = len(self.text)
        self.text += new
        # Only search where a match would end in the new text.
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._until]
        found = [start for start in found if start >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _n_held(self) -> int:
        """Return the length of the longest suffix of the text that starts a stop string."""
        return max(
            (n for s in self._until for n in range(1, len(s)) if self.text.endswith(s[:n])),
            default=0,
        )


def last_tokens(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """Return the last CONTEXT tokens of a prompt, or more if these have no text."""
    n = CONTEXT
    while n < len(prompt) and not tokenizer.decode(list(prompt[-n:])):
        n *= 2
    return list(prompt[-n:])
