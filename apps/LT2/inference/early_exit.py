"""Decode steps that leave the loops early, in eager mode or as CUDA graphs.

    decode = ExitDecoder(model, cache, rule, graph=True)        # while the cache is empty
    logits_B1V = decode.step(tokens_B1)
    decode.tally.n_loops / decode.tally.n_tokens

The rows of a step leave separately; see apps.LT2.exits for the rule. The step stops when all of
them have left: the caches of the other loops take the token in, and the head runs. The host waits
for this decision after each loop. With CUDA graphs, each loop is a graph, and so is each end of a
step. Shapes: B rows of the cache, V vocabulary.
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
from apps.LT2.mixers.linear import LinearCache
from apps.LT2.transformer import LoopedTransformer


@dataclass
class LoopTally:
    n_tokens: int  # of steps
    n_loops: Tensor  # () int64, that they ran


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
        self.tally = LoopTally(0, torch.zeros((), dtype=torch.int64, device=device))
        self._tokens_B1 = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
        self._is_free_B1 = torch.zeros(cache.batch_size, 1, dtype=torch.bool, device=device)
        self._was_free: list[bool] | None = None
        for mixer_cache in (one for loop in cache.mixers for one in loop):
            if isinstance(mixer_cache, LinearCache):
                mixer_cache.last_inputs = ()  # keep them
        self._graphs: _Graphs | None = None
        if graph:
            self._graphs = _Graphs(self, self._tokens_B1)
            self.tally.n_tokens, self.tally.n_loops[...] = 0, 0  # without the warm-up

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
        at, all_left = None, None
        for t in range(self.loop_count):
            if self._graphs is None:
                at, all_left = self.run(t, at)
            else:
                all_left = self._graphs.run(t)
            if t + 1 == leave_after or t + 1 < self.loop_count and leave_after is None and all_left:
                break
        return self.end(t + 1, at) if self._graphs is None else self._graphs.end(t + 1)

    def run(self, t: int, at: TokenLoops | None) -> tuple[TokenLoops, Tensor]:
        """Run loop t; return the state after it, and whether all rows have left, ()."""
        if at is None:
            at = enter_loops(self.model, self._tokens_B1, self._is_free_B1)
        at = run_loop(self.model, self.rule, at, t, _step_layer, self.cache.mixers[t])
        return at, at.left_BT.all()

    def end(self, t: int, at: TokenLoops | None) -> Tensor:
        """Skip the loops from t on, and return the logits (B, 1, V)."""
        assert at is not None
        layout, caches = self.model.inference_layout, self.cache.mixers
        for loop, memories in zip(layout[t:], caches[t:], strict=True):
            for block, *entries in zip(
                *(self.model.layers, at.inputs, loop, memories, layout[t - 1], caches[t - 1]),
                strict=True,
            ):
                block.repeat_step(*entries)  # pyright: ignore[reportCallIssue]
        self.tally.n_loops += at.n_BT.sum()
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
        self.all_left: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.states: list[TokenLoops] = []  # keep the tensors between graphs allocated
        with torch.cuda.device(tokens_B1.device), torch.no_grad():
            with on_side_stream():
                for t in range(self.n_loops):
                    for _ in range(WARMUP_STEPS):
                        with cache.preserved():
                            decoder.step(tokens_B1, leave_after=t + 1)
            with cache.preserved():
                self._pool = torch.cuda.graph_pool_handle()
                at = None
                for t in range(self.n_loops):
                    with self._capture(self.loops):
                        at, all_left = decoder.run(t, at)
                    self.states.append(at)
                    self.all_left.append(all_left)
                    with self._capture(self.ends):
                        self.logits.append(decoder.end(t + 1, at))

    def _capture(self, graphs: list[torch.cuda.CUDAGraph]) -> AbstractContextManager[None]:
        graphs.append(torch.cuda.CUDAGraph())
        # thread_local: other threads, such as a data loader's, may allocate meanwhile.
        return torch.cuda.graph(graphs[-1], pool=self._pool, capture_error_mode="thread_local")

    def run(self, t: int) -> Tensor:
        self.loops[t].replay()
        return self.all_left[t]

    def end(self, t: int) -> Tensor:
        self.ends[t - 1].replay()
        return self.logits[t - 1]
