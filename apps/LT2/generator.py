"""Generation: prompts are prefilled packed, without padding, and decoded together with caches.

    generator = PackedCausalTransformerGenerator(cfg, model, tokenizer)
    texts, loglikelihoods, greedy = generator.generate(["Once upon a time", "In a"])

The prefill scores the prompts, too, so that the same call serves generation and evaluation. Shapes:
B sequences of a batch, T tokens of its packed prompts, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.LT2.load import check_dtype
from apps.LT2.sampling import check_sampling, prompt_rng, sample_tokens
from apps.LT2.text_stream import TextStream
from apps.LT2.transformer import LoopedTransformer
from lingua.args import UserError
from lingua.parallelize import DTYPES
from lingua.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]  # a text, or token ids that are taken as they are
OnText = Callable[[int, str], None]  # (place of the prompt in the list, new text of its answer)


@dataclass
class PackedCausalTransformerGeneratorArgs:
    temperature: float = 0.0  # 0 = always the likeliest token; 1 = the model's own distribution
    top_p: float | None = None  # draw from the likeliest tokens that hold this share, 0 to 1
    top_k: int | None = None  # draw from this many likeliest tokens; null = from all
    max_gen_len: int = 512  # longest answer in tokens; 0 only scores the prompts
    # cache slots of a batch, prompts and answers; how many prompts run together follows from it
    max_tokens: int = 1024
    max_prompt_len: int | None = None  # longer prompts lose tokens at their start; null = none do
    until: list[str] = field(
        default_factory=list
    )  # texts that end an answer, which ends before them
    compile_prefilling: bool = False  # compile the prefill: not in this version, keep false
    reduce_generation_overhead: bool = False  # CUDA graphs: not in this version, keep false
    show_progress: bool = False  # count answers and tokens on stderr
    dtype: str = "auto"  # bf16, fp16 or fp32 of weight matrices and cache; auto: bf16 on GPUs
    device: str = "auto"  # cpu, cuda or cuda:N; auto: cuda where there is one
    seed: int = 42  # of the sampling; each prompt has its own stream of random numbers

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.top_k)
        check_dtype(self.dtype)
        if self.max_gen_len < 0:
            raise UserError(f"max_gen_len={self.max_gen_len} must be 0 or more tokens")
        if self.max_prompt_len is not None and self.max_prompt_len < 1:
            raise UserError(
                f"max_prompt_len={self.max_prompt_len} must be at least 1 token, or null"
            )
        if self.max_tokens <= self.max_gen_len:
            raise UserError(
                f"max_tokens={self.max_tokens} leaves no room for a prompt beside "
                f"max_gen_len={self.max_gen_len}: set it above {self.max_gen_len}"
            )
        if "" in self.until:
            raise UserError("until holds an empty text, which would end every answer: leave it out")
        for option in ("compile_prefilling", "reduce_generation_overhead"):
            if getattr(self, option):
                raise UserError(f"{option}=true: this version cannot do that, leave it false")


@dataclass
class Completion:
    text: str  # the answer alone, without the stop string
    tokens: list[int]  # of the answer, with the EOS or the stop string that ended it
    # of the prompt's tokens (after truncation) but the first, on the CPU; empty if not asked for:
    loglikelihood: Tensor  # log p(token | the tokens before it) in nats, fp32
    greedy: Tensor  # bool: is that token the one that the model holds for the likeliest?


class PackedCausalTransformerGenerator:
    """Answers prompts with a model, batch by batch. Options are read from `cfg` at each call."""

    def __init__(
        self,
        cfg: PackedCausalTransformerGeneratorArgs,
        model: LoopedTransformer,
        tokenizer: Tokenizer,
        *,
        add_bos: bool = True,
    ):
        """add_bos: texts begin with BOS (if there is one), as documents did in training."""
        self.cfg, self.model, self.tokenizer = cfg, model, tokenizer
        self.add_bos = add_bos and tokenizer.bos_id >= 0

    def generate(self, prompts: Sequence[Prompt]) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Answers; and of each prompt the log-likelihoods and the greediness, as in Completion."""
        done = list(self.complete(prompts))
        return [c.text for c in done], [c.loglikelihood for c in done], [c.greedy for c in done]

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        places: Sequence[int] | None = None,
        on_text: OnText | None = None,
        score: bool = True,
    ) -> Iterator[Completion]:
        """A Completion for each prompt, in order, as soon as its batch is done.

        places: where each prompt stands in a longer list; the place chooses its random numbers.
        score: score the prompts, which takes logits for each of their tokens.
        """
        if places is None:
            places = range(len(prompts))
        tokens = self._prepare(prompts)
        progress = Progress(len(prompts)) if self.cfg.show_progress else None
        for batch in batch_prompts(tokens, self.cfg.max_tokens, self.cfg.max_gen_len):
            answers = [self._new_answer(places[i]) for i in batch]

            def after_token(batch: range = batch, answers: list[Answer] = answers) -> None:
                for i, answer in zip(batch, answers, strict=True):
                    if on_text and (new := answer.stream.take()):
                        on_text(i, new)
                if progress:
                    progress.update(batch.start, answers)

            scores = self._run_batch([tokens[i] for i in batch], answers, after_token, score)
            for answer, (loglikelihood, greedy) in zip(answers, scores, strict=True):
                yield Completion(answer.stream.text, answer.tokens, loglikelihood, greedy)
        if progress:
            progress.close()

    def _prepare(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt, cut to max_prompt_len; refuses what the cache cannot hold."""
        cfg = self.cfg
        tokens = [self._encode(prompt) for prompt in prompts]
        if cfg.max_prompt_len is not None:
            n_over = sum(len(t) > cfg.max_prompt_len for t in tokens)
            if n_over:
                logger.warning(
                    f"max_prompt_len={cfg.max_prompt_len}: {n_over} of {len(tokens)} prompts are "
                    "longer and lose the tokens at their start"
                )
            tokens = [t[-cfg.max_prompt_len :] for t in tokens]
        room = cfg.max_tokens - cfg.max_gen_len
        for i, t in enumerate(tokens):
            if len(t) > room:
                raise UserError(
                    f"prompt {i + 1} of {len(tokens)} has {len(t)} tokens, and max_tokens="
                    f"{cfg.max_tokens} has room for {room} beside max_gen_len={cfg.max_gen_len}: "
                    f"set max_tokens={len(t) + cfg.max_gen_len}, or cut prompts by max_prompt_len="
                    f"{room}"
                )
        return tokens

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, add_bos=self.add_bos, add_eos=False)
        else:
            tokens = list(prompt)
        if tokens:
            return tokens
        if self.tokenizer.bos_id < 0:
            raise UserError(
                "prompts: an empty prompt starts from BOS, and this tokenizer has no such token: "
                "write at least one character"
            )
        return [self.tokenizer.bos_id]

    def _new_answer(self, index: int) -> Answer:
        stream = TextStream(self.tokenizer, self.cfg.until)
        return Answer(prompt_rng(self.cfg.seed, index), stream, done=self.cfg.max_gen_len == 0)

    @torch.no_grad()
    def _run_batch(
        self,
        prompts: list[list[int]],
        answers: list[Answer],
        after_token: Callable[[], None],
        score: bool,
    ) -> list[tuple[Tensor, Tensor]]:
        """Prefill, then decode until all answers are done; returns the prompts' scores."""
        cfg, model = self.cfg, self.model
        tokens_1T, cu_seqlens = pack_prompts(prompts, model.tok_embeddings.weight.device)
        n_slots = max(len(p) for p in prompts) + cfg.max_gen_len
        dtype = None if cfg.dtype == "auto" else DTYPES[cfg.dtype]  # None: that of the weights
        cache = model.init_cache(len(prompts), n_slots, dtype=dtype)
        logits = model.prefill(tokens_1T, cache, cu_seqlens=cu_seqlens, last_only=not score)
        if score:
            scores = score_prompts(logits[0], tokens_1T[0], [len(p) for p in prompts])
            logits_BV = logits[0, cu_seqlens[1:].long() - 1]
        else:
            scores = [(torch.empty(0), torch.empty(0, dtype=torch.bool)) for _ in prompts]
            logits_BV = logits[:, 0]
        del logits  # the largest tensor here by far
        if not logits_BV.isfinite().all():
            raise UserError("the model's logits are NaN or infinite: the checkpoint is broken")
        while True:
            chosen_B = self._choose(logits_BV, answers)
            for answer, token in zip(answers, chosen_B.tolist(), strict=True):
                if not answer.done:
                    answer.push(token, self.tokenizer.eos_id, cfg.max_gen_len)
            after_token()
            if all(answer.done for answer in answers):
                return scores
            # Rows that are done go along; what they say is not looked at.
            logits_BV = model.step(chosen_B[:, None], cache)[:, 0]

    def _choose(self, logits_BV: Tensor, answers: list[Answer]) -> Tensor:
        u_B = torch.tensor([answer.rng.random() for answer in answers], dtype=torch.float64)
        return sample_tokens(
            logits_BV[:, : self.tokenizer.n_words],  # a padded vocabulary has ids without a text
            u_B.to(logits_BV.device),
            temperature=self.cfg.temperature,
            top_p=self.cfg.top_p,
            top_k=self.cfg.top_k,
        )


@dataclass
class Answer:
    """One sequence while it is decoded."""

    rng: random.Random
    stream: TextStream
    done: bool = False
    tokens: list[int] = field(default_factory=list)

    def push(self, token: int, eos_id: int, max_gen_len: int) -> None:
        self.tokens.append(token)
        if token != eos_id:
            self.stream.push(token)
        self.done = token == eos_id or self.stream.stopped or len(self.tokens) == max_gen_len
        if self.done:
            self.stream.finish()


def batch_prompts(
    prompts: Sequence[Sequence[int]], max_tokens: int, max_gen_len: int
) -> Iterator[range]:
    """Cut a list of prompts into batches, in order.

    Every row of a cache is as long as the longest prompt and its answer need, and the rows of a
    batch have at most `max_tokens` slots together.
    """
    start, longest = 0, 0
    for i, prompt in enumerate(prompts):
        longest = max(longest, len(prompt) + max_gen_len)
        if i > start and longest * (i - start + 1) > max_tokens:
            yield range(start, i)
            start, longest = i, len(prompt) + max_gen_len
    if prompts:
        yield range(start, len(prompts))


def pack_prompts(
    prompts: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """All prompts in one row (1, T) int64, and their bounds (n + 1,) int32."""
    tokens = torch.tensor([t for prompt in prompts for t in prompt], device=device)
    bounds = list(itertools.accumulate((len(prompt) for prompt in prompts), initial=0))
    return tokens[None], torch.tensor(bounds, dtype=torch.int32, device=device)


def score_prompts(
    logits_TV: Tensor, tokens_T: Tensor, lengths: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """(log-likelihood, greedy) of each prompt's tokens but its first, which nothing predicts."""
    target_T = tokens_T.roll(-1)  # the last token of a prompt has no target; dropped below
    loglikelihood_T = -F.cross_entropy(logits_TV, target_T, reduction="none").cpu()
    greedy_T = (logits_TV.argmax(dim=-1) == target_T).cpu()
    pieces = zip(loglikelihood_T.split(lengths), greedy_T.split(lengths), strict=True)
    return [(loglikelihood[:-1], greedy[:-1]) for loglikelihood, greedy in pieces]


class Progress:
    """A line on stderr that counts answers and tokens."""

    EVERY = 0.2  # seconds

    def __init__(self, n_prompts: int):
        self.n_prompts = n_prompts
        self.n_tokens = 0  # of batches that are over
        self.start = self.shown = time.monotonic()

    def update(self, n_before: int, answers: list[Answer]) -> None:
        """A token is out for each of `answers`; `n_before` prompts came in earlier batches."""
        n_done = n_before + sum(answer.done for answer in answers)
        n_tokens = self.n_tokens + sum(len(answer.tokens) for answer in answers)
        over = n_done == n_before + len(answers)
        if over:
            self.n_tokens = n_tokens
        now = time.monotonic()
        if over or now - self.shown > self.EVERY:
            self.shown = now
            rate = n_tokens / max(now - self.start, 1e-9)
            line = f"{n_done}/{self.n_prompts} answers, {n_tokens} tokens, {rate:.1f} tokens/s"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        print(file=sys.stderr)
