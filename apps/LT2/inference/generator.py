"""Generate answers: packed prefill without padding, and cached decoding of a batch.

    generator = PackedCausalTransformerGenerator(cfg, model, tokenizer)
    texts, loglikelihoods, greedy = generator.generate(["Once upon a time", "In a"])

The prefill also scores the prompts, so one call serves generation and evaluation. See
continuous_batching.py for how sequences share the rows of the cache.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from apps.LT2.exits import check_exit, exit_loops, parse_exit
from apps.LT2.inference.compiled import compiled_for_generation
from apps.LT2.inference.continuous_batching import ContinuousBatch, Step, group_by_length
from apps.LT2.inference.cuda_graph import DecodeGraph
from apps.LT2.inference.early_exit import ExitDecoder, LoopTally
from apps.LT2.inference.load import check_dtype
from apps.LT2.inference.prefill import PromptPrefill
from apps.LT2.inference.prompts import check_tokens
from apps.LT2.inference.quantize import is_int8, unread_int8
from apps.LT2.inference.sampling import check_sampling, sample_tokens, sequence_rng
from apps.LT2.inference.sequence import GeneratedSequence, TextStream
from apps.LT2.transformer import LoopedTransformer
from lingua.errors import UserError
from lingua.parallel.args import DTYPES
from lingua.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL = 0.2  # seconds

Prompt = str | Sequence[int]  # a text, or token ids, which are used unchanged
OnText = Callable[[int, str], None]  # (index of the answer, its new text)


@dataclass
class PackedCausalTransformerGeneratorArgs:
    temperature: float = 0.0  # 0 = greedy; 1 = sample from the model's own distribution
    top_p: float | None = None  # sample from the fewest top tokens with this total probability
    top_k: int | None = None  # sample from the k most probable tokens; null, 0, -1 = no limit
    max_gen_len: int = 512  # maximum answer length in tokens; 0 only scores the prompts
    # cache slots for prompts and answers; more slots decode more sequences at a time. One extra
    # sequence is allocated if the num_samples answers to a prompt don't all start together
    max_tokens: int = 1024
    max_prompt_len: int | None = None  # cut longer prompts at their start; null = never cut
    # stop strings; an answer ends before the first one
    until: list[str] = field(default_factory=list)
    # compile the prefill; pays off with many prompts, and may change rounding
    compile_prefilling: bool = False
    # compile the decode step; pays off with long answers, and may change rounding
    compile_decoding: bool = False
    # run the decode step as a CUDA graph: faster, same tokens; null = on a GPU
    reduce_generation_overhead: bool | None = None
    show_progress: bool = False  # show the number of answers and tokens on stderr
    # weight matrices and cache: bf16, fp16 or fp32; auto: bf16 on a GPU, fp32 on a CPU
    dtype: str = "auto"
    # leave the loops early: none | a number of loops | gate:0.8, the exit gate's cumulative
    # probability | kl:0.005, KL between the predictions of successive loops; docs/loops.md
    exit: str = "none"
    device: str = "auto"  # cpu, cuda or cuda:N; auto: cuda if available
    seed: int = 42  # random seed; each answer has its own random numbers

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.top_k)
        check_dtype(self.dtype)
        parse_exit(self.exit)
        if self.max_gen_len < 0:
            raise UserError(f"max_gen_len={self.max_gen_len} must be at least 0")
        if self.max_prompt_len is not None and self.max_prompt_len < 1:
            raise UserError(f"max_prompt_len={self.max_prompt_len} must be at least 1, or null")
        if self.max_tokens <= self.max_gen_len:
            raise UserError(
                f"max_tokens={self.max_tokens} leaves no room for a prompt; set it above "
                f"max_gen_len={self.max_gen_len}"
            )
        if "" in self.until:
            raise UserError("until holds an empty text, which would end every answer; remove it")

    def uses_graph(self, device: torch.device) -> bool:
        """Return whether decoding uses a CUDA graph; UserError if it is required without a GPU."""
        if self.reduce_generation_overhead and device.type != "cuda":
            raise UserError(
                f"reduce_generation_overhead=true needs a GPU, not device={device.type}; use null"
            )
        return self.reduce_generation_overhead is not False and device.type == "cuda"


@dataclass
class Completion:
    # the text that the answer adds to the decoded prompt, up to the stop string
    text: str
    tokens: list[int]  # the answer with the EOS or stop string that ended it
    # Scores of all tokens of the cut prompt except the first; on the CPU, empty if not requested.
    loglikelihood: Tensor  # log p(token | tokens before it) in nats, fp32
    greedy: Tensor  # bool: the token is the argmax


class PackedCausalTransformerGenerator:
    """Answer prompts with a model. Every call reads the options from `cfg`."""

    def __init__(
        self,
        cfg: PackedCausalTransformerGeneratorArgs,
        model: LoopedTransformer,
        tokenizer: Tokenizer,
        *,
        add_bos: bool = True,
    ):
        """add_bos: start texts with BOS, if the tokenizer has one, as in training."""
        self.cfg, self.model, self.tokenizer = cfg, model, tokenizer
        self.add_bos = add_bos and tokenizer.bos_id >= 0
        self.device = model.tok_embeddings.weight.device
        self.gaps = torch.tensor(tokenizer.gaps, dtype=torch.int64, device=self.device)
        cfg.uses_graph(self.device)
        if cfg.exit != "none":
            n_loops = len(model.inference_layout)
            rule = check_exit(cfg.exit, model.args, n_loops)
            if rule is not None and not rule.may_fire(n_loops):
                logger.warning("exit=%s has no effect with %d loops", cfg.exit, n_loops)
        self._tallies: list[LoopTally] = []  # of the last `complete`
        self._has_warned = False  # of 8-bit weights that steps don't read

    @property
    def mean_loops(self) -> float | None:
        """Loops per token of the decode steps of the last `complete`, under exit=gate and kl.

        None before its first step. The first token of an answer comes from the prompt's pass, which
        runs all loops.
        """
        n_tokens = sum(tally.n_tokens for tally in self._tallies)
        n_loops = sum(tally.n_loops for tally in self._tallies)
        return n_loops / n_tokens if n_tokens else None

    def generate(self, prompts: Sequence[Prompt]) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Return each prompt's answer, log-likelihoods and greedy flags, as in Completion."""
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
        """Yield `num_samples` Completions of each prompt, in order, as they are done.

        places: index of each prompt in a longer list; it selects the random numbers.
        on_text: called with the index of a Completion and its new text.
        score: score the prompts, which computes logits for all their tokens.
        UserError, before anything runs, for a prompt that `prepare` rejects.
        """
        sequences = []
        for i, tokens in enumerate(self.prepare(prompts)):
            if isinstance(tokens, UserError):
                raise UserError(f"prompt {i + 1} of {len(prompts)}: {tokens}")
            place = i if places is None else places[i]
            sequences += [self._new_sequence(tokens, place, k) for k in range(num_samples)]
        index = {sequence: i for i, sequence in enumerate(sequences)}
        batches = self._run(sequences, score)
        if self.cfg.show_progress:
            batches = show_progress(batches, len(sequences))
        n_out = 0
        for advanced in batches:
            for sequence in advanced:
                if on_text and (new := sequence.stream.take()):
                    on_text(index[sequence], new)
            while n_out < len(sequences) and sequences[n_out].done:
                done = sequences[n_out]
                yield Completion(done.stream.text, done.tokens, *done.scores)
                n_out += 1

    def prepare(self, prompts: Sequence[Prompt]) -> list[list[int] | UserError]:
        """Return the token ids of each prompt, cut to max_prompt_len, or why it can't run."""
        limit = self.cfg.max_prompt_len
        tokens = [self._encode(prompt) for prompt in prompts]
        if limit is not None:
            n_cut = sum(len(t) > limit for t in tokens)
            if n_cut:
                logger.warning(
                    f"max_prompt_len={limit}: cut {n_cut} of {len(tokens)} prompts at their start"
                )
            tokens = [t[-limit:] for t in tokens]
        return [self._find_problem(t) or t for t in tokens]

    def _encode(self, prompt: Prompt) -> list[int]:
        """Return token ids; an empty prompt is BOS alone, or [] if the tokenizer has none."""
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, add_bos=self.add_bos, add_eos=False)
        else:
            tokens = list(prompt)
        return tokens or [self.tokenizer.bos_id] * (self.tokenizer.bos_id >= 0)

    def _find_problem(self, tokens: list[int]) -> UserError | None:
        cfg = self.cfg
        room = cfg.max_tokens - cfg.max_gen_len
        if not tokens:
            return UserError(
                "an empty prompt needs a BOS token, which this tokenizer doesn't have; write at "
                "least one character"
            )
        if len(tokens) > room:
            return UserError(
                f"it has {len(tokens)} tokens; max_tokens={cfg.max_tokens} leaves {room} after "
                f"max_gen_len={cfg.max_gen_len}; set max_tokens={len(tokens) + cfg.max_gen_len} or "
                f"max_prompt_len={room}"
            )
        try:
            check_tokens([tokens], self.model)
        except UserError as error:
            return error
        return None

    def _new_sequence(self, tokens: list[int], prompt: int, sample: int) -> GeneratedSequence:
        rng = sequence_rng(self.cfg.seed, prompt, sample)
        stream = TextStream(self.tokenizer, self.cfg.until, tokens)
        return GeneratedSequence(tokens, self.cfg.max_gen_len, rng, stream)

    def _run(
        self, sequences: list[GeneratedSequence], score: bool
    ) -> Iterator[list[GeneratedSequence]]:
        """Yield the sequences that advanced, after every prefill and every step."""
        cfg = self.cfg
        self._tallies = []
        compiled = compiled_for_generation(
            self.model, prefill=cfg.compile_prefilling, step=cfg.compile_decoding
        )
        with compiled, exit_loops(self.model, parse_exit(cfg.exit)):
            for group in group_by_length([s.n_slots for s in sequences], cfg.max_tokens):
                try:
                    yield from self._run_group([sequences[i] for i in group], score)
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"max_tokens={cfg.max_tokens} needs more memory than the GPU has; lower "
                        f"it: {error}"
                    ) from None

    def _run_group(
        self, sequences: list[GeneratedSequence], score: bool
    ) -> Iterator[list[GeneratedSequence]]:
        """Run sequences of similar length in one cache."""
        cfg, model = self.cfg, self.model
        n_slots = max(s.n_slots for s in sequences)
        dtype = None if cfg.dtype == "auto" else DTYPES[cfg.dtype]  # None: as the weights
        make_cache = partial(model.init_cache, max_seqlen=n_slots, dtype=dtype)
        cache = make_cache(min(len(sequences), cfg.max_tokens // n_slots))
        if is_int8(model) and not self._has_warned:
            option = f"max_tokens={cfg.max_tokens}"
            warning = unread_int8(model.args.dim, cache.batch_size, option)
            if warning is not None and cfg.max_gen_len > 1:
                self._has_warned = True
                logger.warning(warning)
        prefill = PromptPrefill(model, cache, partial(make_cache, 1), score=score)
        rows: list[GeneratedSequence | None] = [None] * cache.batch_size
        rule = parse_exit(cfg.exit)
        use_graph = cfg.uses_graph(self.device) and cfg.max_gen_len > 1  # the prefill gives token 1
        step: Step = partial(model.step, cache=cache)
        if rule is not None and not rule.is_fixed:
            decoder = ExitDecoder(model, cache, rule, graph=use_graph, rows=rows)
            self._tallies.append(decoder.tally)
            step = decoder.step
        elif use_graph:
            step = DecodeGraph(model, cache).step
        eos_id = self.tokenizer.eos_id
        return ContinuousBatch(prefill, step, self._choose, eos_id=eos_id, rows=rows).run(sequences)

    def _choose(self, logits_NV: Tensor, sequences: Sequence[GeneratedSequence | None]) -> Tensor:
        """Return the next token of each sequence; free rows (None) get an arbitrary one."""
        u = [0.0 if sequence is None else sequence.rng.random() for sequence in sequences]
        logits_NV = logits_NV[:, : self.tokenizer.n_words]  # later ids have no text
        if len(self.gaps):
            logits_NV = logits_NV.index_fill(1, self.gaps, -torch.inf)
        return sample_tokens(
            logits_NV,
            torch.tensor(u, dtype=torch.float64),
            temperature=self.cfg.temperature,
            top_p=self.cfg.top_p,
            top_k=self.cfg.top_k,
        )


def show_progress(
    batches: Iterator[list[GeneratedSequence]], n_answers: int
) -> Iterator[list[GeneratedSequence]]:
    """Pass on the sequences that advanced; show the number of answers and tokens on stderr."""
    n_done = n_tokens = 0
    start = shown = time.monotonic()
    for advanced in batches:
        n_done += sum(sequence.done for sequence in advanced)
        n_tokens += sum(bool(sequence.tokens) for sequence in advanced)
        now = time.monotonic()
        if n_done == n_answers or now - shown > PROGRESS_INTERVAL:
            shown = now
            line = f"{n_done}/{n_answers} answers, {n_tokens} tokens"
            rate = n_tokens / max(now - start, 1e-9)
            print(f"\r{line}, {rate:.1f} tokens/s", end="", file=sys.stderr, flush=True)
        yield advanced
    print(file=sys.stderr)
