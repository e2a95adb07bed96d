"""Decode steps that leave the loops early, in eager mode or as CUDA graphs.

    decode = ExitDecoder(model, cache, rule, graph=True)        # while the cache is empty
    logits_B1V = decode.step(tokens_B1)
    decode.tally.n_loops / decode.tally.n_tokens

The rows of a step leave separately; see apps.LT2.exits for the rule. The step stops when all of
them have left: the caches of the other loops take the token in, and the head runs. With CUDA
graphs, each loop is a graph, and so is each end of a step. The host waits for a loop's decision,
which the graph copies to pinned memory. Shapes: B rows of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apps.LT2.cache import ModelCache
from apps.LT2.exits import ExitRule, TokenLoops, enter_loops, run_loop
from apps.LT2.inference.cuda_graph import WARMUP_STEPS, on_side_stream
from apps.LT2.kernel.skipped_loops import SkippedLoops
from apps.LT2.mixers.linear import LinearCache
from apps.LT2.transformer import LoopedTransformer


@dataclass
class LoopTally:
    n_tokens: int = 0  # of steps
    n_loops: int = 0  # that they ran


class ExitDecoder:
    """Steps of one cache by a rule that decides for each token.

    `rows` has None for a row whose token doesn't count: it delays no exit and is not in the mean.
    """

    def __init__(
        self,
        model: LoopedTransformer,
        cache: ModelCache,
        rule: ExitRule,
        *,
        graph: bool = False,
        rows: Sequence[object] | None = None,
    ):
        """With `graph`, capture the steps; every row must have room for one more token."""
        self.model, self.cache, self.rule = model, cache, rule
        self.rows = [True] * cache.batch_size if rows is None else rows
        device = model.tok_embeddings.weight.device
        self.tally, self.skipped = LoopTally(), SkippedLoops()
        self._tokens_B1 = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
        self._is_free_B1 = torch.zeros(cache.batch_size, 1, dtype=torch.bool, device=device)
        self._was_free: list[bool] | None = None
        for mixer_cache in (one for loop in cache.mixers for one in loop):
            if isinstance(mixer_cache, LinearCache):
                mixer_cache.last_inputs = ()  # keep them
        self._graphs: _Graphs | None = None
        if graph:
            self._graphs = _Graphs(self, self._tokens_B1)
            self.tally.n_tokens = self.tally.n_loops = 0  # without the warm-up

    @property
    def loop_count(self) -> int:
        return len(self.cache.mixers)

    @torch.no_grad()
    def step(self, tokens_B1: Tensor, leave_after: int | None = None) -> Tensor:
        """Do what `model.step` does, with exits. With graphs, the next call overwrites the logits.

        leave_after: all rows leave after this number of loops, to time and to warm up.
        """
        self.cache.extend(range(self.cache.batch_size), [1] * self.cache.batch_size)
        self._tokens_B1.copy_(tokens_B1)
        is_free = [row is None for row in self.rows]
        if is_free != self._was_free:
            self._is_free_B1.copy_(torch.tensor(is_free)[:, None])
            self._was_free = is_free
        self.tally.n_tokens += len(is_free) - sum(is_free)
        at, left = None, is_free
        for t in range(self.loop_count):
            self.tally.n_loops += len(left) - sum(left)
            if self._graphs is None:
                at = self.run(t, at)
                left_B1 = at.left_BT
            else:
                left_B1 = self._graphs.run(t)
            if t + 1 == leave_after or t + 1 == self.loop_count:
                break
            if leave_after is None and self.rule.may_fire(t + 2):
                if self._graphs is not None:
                    torch.cuda.current_stream(self._tokens_B1.device).synchronize()
                left = left_B1[:, 0].tolist()
                if all(left):
                    break
        return self.end(t + 1, at) if self._graphs is None else self._graphs.end(t + 1)

    def run(self, t: int, at: TokenLoops | None) -> TokenLoops:
        """Run loop t; return the state after it."""
        if at is None:
            at = enter_loops(self.model, self._tokens_B1, self._is_free_B1)
        # A single row runs no loop after it has left.
        options = {"all_run": self.cache.batch_size == 1}
        return run_loop(self.model, self.rule, at, t, _step_layer, self.cache.mixers[t], **options)

    def end(self, t: int, at: TokenLoops | None) -> Tensor:
        """Skip the loops from t on, and return the logits (B, 1, V)."""
        assert at is not None
        layout, caches = self.model.inference_layout, self.cache.mixers
        for loop, memories in zip(layout[t:], caches[t:], strict=True):
            for block, *entries in zip(
                *(self.model.layers, at.inputs, loop, memories, layout[t - 1], caches[t - 1]),
                strict=True,
            ):
                block.repeat_step(*entries, self.skipped)  # pyright: ignore[reportCallIssue]
        self.skipped.run()
        is_known = self.rule.kind == "kl" and at.seen is not None
        return at.seen if is_known else self.model.logits_of(at.h_BTD)  # pyright: ignore


def _step_layer(block: Any, h: Tensor, spec: Any, memory: Any) -> Tensor:
    return block.step(h, spec, memory)


class _Graphs:
    """A graph for each loop, and one for each end of a step; they share memory.

    Graphs that share memory run in the order of their capture: a step runs loops 0, ..., t - 1 and
    end t, and no end before it.
    """

    def __init__(self, decoder: ExitDecoder, tokens_B1: Tensor):
        cache, self.n_loops = decoder.cache, decoder.loop_count
        self.loops: list[torch.cuda.CUDAGraph] = []
        self.ends: list[torch.cuda.CUDAGraph] = []
        pinned, device = tokens_B1.is_cuda, tokens_B1.device
        self._left = torch.empty(
            self.n_loops, *tokens_B1.shape, dtype=torch.bool, pin_memory=pinned
        )
        self.logits: list[Tensor] = []
        self.states: list[TokenLoops] = []  # keep the tensors between graphs allocated
        with torch.cuda.device(device), torch.no_grad():
            with on_side_stream():
                for t in range(self.n_loops):
                    for _ in range(WARMUP_STEPS):
                        with cache.preserved():
                            decoder.step(tokens_B1, leave_after=t + 1)
            decoder.skipped.reserve_tables(device)
            with cache.preserved():
                self._pool = torch.cuda.graph_pool_handle()
                at = None
                for t in range(self.n_loops):
                    with self._capture(self.loops):
                        at = decoder.run(t, at)
                        if t + 1 < self.n_loops:
                            self._left[t].copy_(at.left_BT, non_blocking=True)
                    self.states.append(at)
                    with self._capture(self.ends):
                        self.logits.append(decoder.end(t + 1, at))
            decoder.skipped.fill_tables()

    def _capture(self, graphs: list[torch.cuda.CUDAGraph]) -> AbstractContextManager[None]:
        graphs.append(torch.cuda.CUDAGraph())
        # thread_local: other threads, such as a data loader's, may allocate meanwhile.
        return torch.cuda.graph(graphs[-1], pool=self._pool, capture_error_mode="thread_local")

    def run(self, t: int) -> Tensor:
        """Return which rows have left after loop t, (B, 1) on the host, after a sync."""
        self.loops[t].replay()
        return self._left[t]

    def end(self, t: int) -> Tensor:
        self.ends[t - 1].replay()
        return self.logits[t - 1]
