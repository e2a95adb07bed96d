"""Generation: prompts are prefilled packed, without padding, and decoded together with caches.

    generator = PackedCausalTransformerGenerator(cfg, model, tokenizer)
    texts, loglikelihoods, greedy = generator.generate(["Once upon a time", "In a"])

The prefill scores the prompts, too, so that the same call serves generation and evaluation. Rows of
the cache are refilled as they come free, see continuous_batching.py.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from apps.LT2.cache import ModelCache
from apps.LT2.inference.compiled import compiled_for_generation
from apps.LT2.inference.continuous_batching import ContinuousBatch, Step, group_by_length
from apps.LT2.inference.cuda_graph import DecodeGraph
from apps.LT2.inference.load import check_dtype
from apps.LT2.inference.prefill import PromptPrefill
from apps.LT2.inference.prompts import check_tokens
from apps.LT2.inference.sampling import all_finite, check_sampling, sample_tokens, sequence_rng
from apps.LT2.inference.sequence import GeneratedSequence, TextStream
from apps.LT2.transformer import LoopedTransformer
from lingua.errors import UserError
from lingua.parallel.args import DTYPES
from lingua.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]  # a text, or token ids that are taken as they are
OnText = Callable[[int, str], None]  # (place of the answer among all, new text of it)


@dataclass
class PackedCausalTransformerGeneratorArgs:
    temperature: float = 0.0  # 0 = always the likeliest token; 1 = the model's own distribution
    top_p: float | None = None  # draw from the likeliest tokens that hold this share, 0 to 1
    top_k: int | None = None  # draw from this many likeliest tokens; null = from all
    max_gen_len: int = 512  # longest answer in tokens; 0 only scores the prompts
    # cache slots, prompts and answers; how many sequences run at a time follows from it. Samples of
    # a prompt that do not all begin at once take one sequence's slots more, for the prompt.
    max_tokens: int = 1024
    max_prompt_len: int | None = None  # longer prompts lose tokens at their start; null = none do
    until: list[str] = field(
        default_factory=list
    )  # texts that end an answer, which ends before them
    # compile the prefill for any length: pays off over many prompts; rounding may differ
    compile_prefilling: bool = False
    # compile the decode step: pays off over long answers; rounding may differ
    compile_decoding: bool = False
    # decode by a CUDA graph, which gives the same tokens sooner; null = on a GPU
    reduce_generation_overhead: bool | None = None
    show_progress: bool = False  # count answers and tokens on stderr
    dtype: str = "auto"  # bf16, fp16 or fp32 of weight matrices and cache; auto: bf16 on GPUs
    device: str = "auto"  # cpu, cuda or cuda:N; auto: cuda where there is one
    seed: int = 42  # of the sampling; each answer has its own stream of random numbers

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

    def uses_graph(self, device: torch.device) -> bool:
        """Does decoding on `device` replay a CUDA graph? A UserError where it shall and cannot."""
        if self.reduce_generation_overhead and device.type != "cuda":
            raise UserError(
                "reduce_generation_overhead=true: CUDA graphs need a GPU, and this is device="
                f"{device.type}; use null, which takes them where they are"
            )
        return self.reduce_generation_overhead is not False and device.type == "cuda"


@dataclass
class Completion:
    text: str  # the answer alone, without the stop string
    tokens: list[int]  # of the answer, with the EOS or the stop string that ended it
    # of the prompt's tokens (after truncation) but the first, on the CPU; empty if not asked for:
    loglikelihood: Tensor  # log p(token | the tokens before it) in nats, fp32
    greedy: Tensor  # bool: is that token the one that the model holds for the likeliest?


class PackedCausalTransformerGenerator:
    """Answers prompts with a model. Options are read from `cfg` at each call."""

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
        cfg.uses_graph(self.device)

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    def generate(self, prompts: Sequence[Prompt]) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Answers; and of each prompt the log-likelihoods and the greediness, as in Completion."""
        done = list(self.complete(prompts))
        return [c.text for c in done], [c.loglikelihood for c in done], [c.greedy for c in done]

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        num_samples: int = 1,
        places: Sequence[int] | None = None,
        on_text: OnText | None = None,
        score: bool = True,
    ) -> Iterator[Completion]:
        """`num_samples` Completions of each prompt, in order, as soon as those before are done.

        places: where each prompt stands in a longer list; the place chooses its random numbers.
        on_text: told of text as it comes, with its Completion's place among all of this call.
        score: score the prompts, which takes logits for each of their tokens.
        A UserError, before anything runs, for a prompt that `prepare` refuses.
        """
        sequences = []
        for i, tokens in enumerate(self.prepare(prompts)):
            if isinstance(tokens, UserError):
                raise UserError(f"prompt {i + 1} of {len(prompts)}: {tokens}")
            place = i if places is None else places[i]
            sequences += [self._new_sequence(tokens, place, k) for k in range(num_samples)]
        yield from self._report(sequences, on_text, score)

    def prepare(self, prompts: Sequence[Prompt]) -> list[list[int] | UserError]:
        """Token ids of each prompt, cut to max_prompt_len; or why it cannot be answered."""
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
        return [self._find_problem(t) or t for t in tokens]

    def _encode(self, prompt: Prompt) -> list[int]:
        """Token ids; none for an empty prompt that has no BOS to start from."""
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, add_bos=self.add_bos, add_eos=False)
        else:
            tokens = list(prompt)
        return tokens or [self.tokenizer.bos_id] * (self.tokenizer.bos_id >= 0)

    def _find_problem(self, tokens: list[int]) -> UserError | None:
        cfg = self.cfg
        if not tokens:
            return UserError(
                "an empty prompt starts from BOS, and this tokenizer has no such token: "
                "write at least one character"
            )
        try:
            check_tokens([tokens], self.model)
        except UserError as error:
            return error
        room = cfg.max_tokens - cfg.max_gen_len
        if len(tokens) <= room:
            return None
        return UserError(
            f"it has {len(tokens)} tokens, and max_tokens={cfg.max_tokens} has room for {room} "
            f"beside max_gen_len={cfg.max_gen_len}: set max_tokens={len(tokens) + cfg.max_gen_len}"
            f", or cut prompts by max_prompt_len={room}"
        )

    def _new_sequence(self, tokens: list[int], prompt: int, sample: int) -> GeneratedSequence:
        return GeneratedSequence(
            tokens,
            self.cfg.max_gen_len,
            sequence_rng(self.cfg.seed, prompt, sample),
            TextStream(self.tokenizer, self.cfg.until),
        )

    def _report(
        self, sequences: list[GeneratedSequence], on_text: OnText | None, score: bool
    ) -> Iterator[Completion]:
        """Run the sequences, tell of what comes, and give out what is done in their order."""
        place = {id(sequence): i for i, sequence in enumerate(sequences)}
        progress = Progress(len(sequences)) if self.cfg.show_progress else None
        n_out = 0
        for moved in self._run(sequences, score):
            if progress:
                progress.update(moved)
            for sequence in moved:
                if on_text and (new := sequence.stream.take()):
                    on_text(place[id(sequence)], new)
            while n_out < len(sequences) and sequences[n_out].done:
                s = sequences[n_out]
                yield Completion(s.stream.text, s.tokens, s.loglikelihood, s.greedy)
                n_out += 1
        if progress:
            progress.close()

    def _run(
        self, sequences: list[GeneratedSequence], score: bool
    ) -> Iterator[list[GeneratedSequence]]:
        """Those that have a token more, after every prefill and every step."""
        cfg, model = self.cfg, self.model
        needs = [sequence.n_slots for sequence in sequences]
        with (
            compiled_for_generation(
                model, prefill=cfg.compile_prefilling, step=cfg.compile_decoding
            ),
            _out_of_memory_names(f"max_tokens={cfg.max_tokens}"),
        ):
            for group in group_by_length(needs, cfg.max_tokens):
                n_slots = max(needs[i] for i in group)
                n_rows = min(len(group), cfg.max_tokens // n_slots)
                dtype = None if cfg.dtype == "auto" else DTYPES[cfg.dtype]  # None: the weights'
                make_cache = partial(model.init_cache, max_seqlen=n_slots, dtype=dtype)
                cache = make_cache(n_rows)
                prefill = PromptPrefill(model, cache, partial(make_cache, 1), score=score)
                batch = ContinuousBatch(
                    prefill, self._step(cache), self._choose, eos_id=self.tokenizer.eos_id
                )
                yield from batch.run([sequences[i] for i in group])

    def _step(self, cache: ModelCache) -> Step:
        """The decode step on this empty cache."""
        model = self.model
        # The first token comes from the prefill.
        if self.cfg.uses_graph(self.device) and self.cfg.max_gen_len > 1:
            graph = DecodeGraph(model, cache)
            return lambda tokens_B1: (graph.step(tokens_B1), graph.finite_B)

        def step(tokens_B1: Tensor) -> tuple[Tensor, Tensor]:
            logits_B1V = model.step(tokens_B1, cache)
            return logits_B1V, all_finite(logits_B1V[:, 0])

        return step

    def _choose(self, logits_NV: Tensor, sequences: Sequence[GeneratedSequence | None]) -> Tensor:
        """The next token of each sequence; any token where there is none."""
        u = [0.0 if sequence is None else sequence.rng.random() for sequence in sequences]
        return sample_tokens(
            logits_NV[:, : self.tokenizer.n_words],  # a padded vocabulary has ids without a text
            torch.tensor(u, dtype=torch.float64),
            temperature=self.cfg.temperature,
            top_p=self.cfg.top_p,
            top_k=self.cfg.top_k,
        )


@contextmanager
def _out_of_memory_names(option: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{option} takes more memory than the GPU has; lower it: {error}") from None


class Progress:
    """A line on stderr that counts answers and tokens."""

    EVERY = 0.2  # seconds

    def __init__(self, n_answers: int):
        self.n_answers = n_answers
        self.n_done = self.n_tokens = 0
        self.start = self.shown = time.monotonic()

    def update(self, moved: list[GeneratedSequence]) -> None:
        """Each of these has a token more, or was scored only."""
        self.n_done += sum(sequence.done for sequence in moved)
        self.n_tokens += sum(bool(sequence.tokens) for sequence in moved)
        now = time.monotonic()
        if self.n_done == self.n_answers or now - self.shown > self.EVERY:
            self.shown = now
            rate = self.n_tokens / max(now - self.start, 1e-9)
            line = f"{self.n_done}/{self.n_answers} answers, {self.n_tokens} tokens"
            print(f"\r{line}, {rate:.1f} tokens/s", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        print(file=sys.stderr)
