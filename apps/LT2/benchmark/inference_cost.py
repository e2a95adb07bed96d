"""Measure prefill and decode of a model at one batch size and length.

Prefill is compute-bound: its share is FLOP/s relative to a large matrix product (MFU). Decode is
memory-bound: its share is the bytes that a step must move relative to the copy bandwidth (MBU).
Several models alternate, repeat by repeat, so that changes of clocks affect all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from apps.LT2.benchmark.timing import (
    Ceilings,
    Spread,
    is_out_of_memory,
    release_memory,
    seconds_of,
    synchronize,
)
from apps.LT2.flops import cache_bytes, prefill_flops, step_traffic
from apps.LT2.inference.cuda_graph import DecodeGraph
from apps.LT2.transformer import LoopedTransformer
from lingua.metrics import GIB

MIB = 2**20
OUT_OF_MEMORY, NOT_MEASURED = "out of memory", "not measured"


@dataclass(frozen=True)
class Plan:
    """How each point is measured."""

    repeats: int
    warmup: int  # runs before the repeats; kernels are compiled and tuned there
    decode_tokens: int  # steps per run
    prefill_chunk: int | None  # tokens prefilled at once; None = all
    compiled: bool  # compile the models, by default again for each point
    cuda_graph: bool  # decode with a CUDA graph
    weights: str = "auto"  # "int8" = 8-bit weights for decode steps
    max_prefill: int | None = None  # tokens of all sequences; larger prefills are not measured
    compile_once: bool = False  # for all lengths


@dataclass
class Cost:
    """Cost of a prefill or a decode step for the whole batch. `problem` says why it is missing."""

    ms: float | None = None  # median
    quartiles_ms: tuple[float, float] | None = None
    tokens_per_s: float | None = None  # all sequences together
    share: float | None = None  # of the measured ceiling
    datasheet_share: float | None = None  # of the data sheet; prefill on known devices
    peak_gib: float | None = None  # on CUDA, if one model is measured alone
    problem: str = ""


@dataclass
class Row:
    config: str
    batch_size: int
    seqlen: int
    cache_mib: float  # per sequence, over all (loop, layer)
    prefill: Cost
    decode: Cost


@dataclass
class Ratio:
    """Speed of the second model relative to the first, from paired repeats."""

    batch_size: int
    seqlen: int
    prefill: Spread | None
    decode: Spread | None


class Task(Protocol):
    def prepare(self) -> None:
        """Do the untimed work before each run."""

    def run(self) -> None: ...


class Prefill:
    def __init__(self, model: LoopedTransformer, batch_size: int, seqlen: int, plan: Plan):
        self.model, self.chunk = model, plan.prefill_chunk or seqlen
        self.cache = model.init_cache(batch_size, seqlen)
        device = model.tok_embeddings.weight.device
        self.tokens_BT = torch.randint(model.args.vocab_size, (batch_size, seqlen), device=device)

    def prepare(self) -> None:
        self.cache.reset()

    def run(self) -> None:
        for tokens in self.tokens_BT.split(self.chunk, dim=1):
            self.model.prefill(tokens, self.cache, last_only=True)


class Decode:
    """Decode steps after `seqlen` cached tokens. Cache content and tokens are random."""

    def __init__(self, model: LoopedTransformer, batch_size: int, seqlen: int, plan: Plan):
        self.seqlen, self.n_tokens = seqlen, plan.decode_tokens
        self.cache = cache = model.init_cache(batch_size, seqlen + plan.decode_tokens)
        device = model.tok_embeddings.weight.device
        self.tokens_B1 = torch.randint(model.args.vocab_size, (batch_size, 1), device=device)
        if plan.cuda_graph:
            self.step = DecodeGraph(model, cache).step
        else:
            self.step = lambda tokens_B1: model.step(tokens_B1, cache)

    def prepare(self) -> None:
        self.cache.fill_randomly(self.seqlen)

    def run(self) -> None:
        for _ in range(self.n_tokens):
            self.step(self.tokens_B1)


def measure_point(
    models: dict[str, LoopedTransformer],
    batch_size: int,
    seqlen: int,
    plan: Plan,
    ceilings: Ceilings,
) -> tuple[list[Row], Ratio | None]:
    """Measure a row for each model, and the ratio of the first two if there are several."""
    if plan.compiled and not plan.compile_once:
        torch.compiler.reset()  # no code specialized for the shapes of another point
    is_long = plan.max_prefill is not None and batch_size * seqlen > plan.max_prefill
    seconds = {Prefill: [Timing([], problem=NOT_MEASURED)] * len(models)}
    seconds |= {
        kind: time_alternately(
            [lambda m=m, kind=kind: kind(m, batch_size, seqlen, plan) for m in models.values()],
            next(iter(models.values())).tok_embeddings.weight.device,
            plan,
        )
        for kind in ((Decode,) if is_long else (Prefill, Decode))
    }
    rows = []
    for i, (name, model) in enumerate(models.items()):
        cache_dtype = model.tok_embeddings.weight.dtype
        rows.append(
            Row(
                name,
                batch_size,
                seqlen,
                cache_bytes(model, seqlen, cache_dtype) / MIB,
                prefill_cost(seconds[Prefill][i], model, batch_size, seqlen, ceilings),
                decode_cost(seconds[Decode][i], model, batch_size, seqlen, plan, ceilings),
            )
        )
    if len(models) < 2:
        return rows, None
    ratios = [paired_ratio(seconds[kind][0], seconds[kind][1]) for kind in (Prefill, Decode)]
    return rows, Ratio(batch_size, seqlen, *ratios)


@dataclass
class Timing:
    seconds: list[float]  # of each repeat; empty if out of memory
    peak_gib: float | None = None
    problem: str = OUT_OF_MEMORY  # if empty


def time_alternately(
    makers: Sequence[Callable[[], Task]], device: torch.device, plan: Plan
) -> list[Timing]:
    """Time tasks alternately. Every second repeat runs them in reverse order."""
    release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    tasks: dict[int, Task] = {}
    timings = [Timing([]) for _ in makers]

    def attempt(i: int, action: Callable[[], None]) -> None:
        try:
            return action()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler the traceback is gone, and with it the tensors of its frames.
        timings[i].seconds.clear()
        tasks.pop(i, None)
        release_memory()

    def begin(i: int) -> None:
        tasks[i] = makers[i]()
        for _ in range(plan.warmup):
            tasks[i].prepare()
            tasks[i].run()
        synchronize(device)

    def repeat(i: int) -> None:
        tasks[i].prepare()
        synchronize(device)
        timings[i].seconds.append(seconds_of(tasks[i].run, device))

    for i in range(len(makers)):
        attempt(i, lambda i=i: begin(i))
    for n in range(plan.repeats):
        for i in sorted(tasks, reverse=n % 2 == 1):
            attempt(i, lambda i=i: repeat(i))
    if device.type == "cuda" and len(makers) == 1:
        timings[0].peak_gib = torch.cuda.max_memory_allocated(device) / GIB
    return timings


def prefill_cost(
    timing: Timing, model: LoopedTransformer, batch_size: int, seqlen: int, ceilings: Ceilings
) -> Cost:
    cost = _cost(timing, n_steps=1, n_tokens=batch_size * seqlen)
    if cost.ms is not None:
        flops = batch_size * prefill_flops(model, seqlen) / (cost.ms / 1000)
        cost.share = flops / ceilings.matmul_flops
        if ceilings.datasheet_flops is not None:
            cost.datasheet_share = flops / ceilings.datasheet_flops
    return cost


def decode_cost(
    timing: Timing,
    model: LoopedTransformer,
    batch_size: int,
    seqlen: int,
    plan: Plan,
    ceilings: Ceilings,
) -> Cost:
    cost = _cost(timing, n_steps=plan.decode_tokens, n_tokens=batch_size)
    if cost.ms is not None:
        moved = step_traffic(model, batch_size, seqlen, model.tok_embeddings.weight.dtype).total
        cost.share = moved / (cost.ms / 1000) / ceilings.copy_bytes_per_s
    return cost


def _cost(timing: Timing, *, n_steps: int, n_tokens: int) -> Cost:
    """Cost of one of the `n_steps` steps of a repeat; a step yields `n_tokens` tokens."""
    if not timing.seconds:
        return Cost(problem=timing.problem)
    ms, low, high = Spread.of([1000 * s / n_steps for s in timing.seconds])
    return Cost(ms, (low, high), 1000 * n_tokens / ms, peak_gib=timing.peak_gib)


def paired_ratio(first: Timing, second: Timing) -> Spread | None:
    if not first.seconds or not second.seconds:
        return None
    pairs = zip(first.seconds, second.seconds, strict=True)
    return Spread.of([a / b for a, b in pairs])
