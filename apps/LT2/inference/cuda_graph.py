"""A decode step as a CUDA graph: hundreds of small kernels, started by one call.

    graph = DecodeGraph(model, cache)        best while the cache is empty: nothing is copied then
    logits_BV = model.prefill(tokens_BT, cache, last_only=True)[:, 0]
    logits_BV = graph.step(logits_BV.argmax(-1, keepdim=True))[:, 0]

A step of a looped model starts some ten kernels for every (loop, layer), and at small batches the
host takes longer to start them than the device to run them. The graph serves its cache for as long
as that lives: rows may be reset, prefilled anew and decoded further, since all of that happens in
place. Shapes: B rows of the cache, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apps.LT2.cache import ModelCache
from apps.LT2.inference.sampling import all_finite
from apps.LT2.transformer import LoopedTransformer

WARMUP_STEPS = 2  # the first one compiles and tunes kernels and loads libraries


class DecodeGraph:
    """`model.step` on one cache, captured. The cache holds afterwards what it held before."""

    def __init__(self, model: LoopedTransformer, cache: ModelCache):
        """Captures a step; every row must have room for one more token."""
        device = model.tok_embeddings.weight.device
        self.model, self.cache = model, cache
        self.tokens_B1 = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            self._warm_up()
            # thread_local: other threads, of a data loader say, may allocate in the meantime.
            capture = torch.cuda.graph(self.graph, capture_error_mode="thread_local")
            with cache.preserved(), capture:
                self.logits_B1V, self.finite_B = self._decode()

    def step(self, tokens_B1: Tensor) -> Tensor:
        """As `model.step`; the logits (B, 1, V) are overwritten by the next call, and so is
        `finite_B`, whether those of a row are finite."""
        self.cache.extend(range(self.cache.batch_size), [1] * self.cache.batch_size)
        self.tokens_B1.copy_(tokens_B1)
        self.graph.replay()
        return self.logits_B1V

    def _decode(self) -> tuple[Tensor, Tensor]:
        logits_B1V = self.model.step(self.tokens_B1, self.cache)
        return logits_B1V, all_finite(logits_B1V[:, 0])

    def _warm_up(self) -> None:
        """Steps that are not captured, on a stream of their own as capture itself uses one."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                with self.cache.preserved():
                    self._decode()
        torch.cuda.current_stream().wait_stream(stream)
