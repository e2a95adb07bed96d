"""One sequence on its way through generation: a prompt, its random numbers and its answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apps.LT2.text_stream import TextStream


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
