"""Run a decode step as a CUDA graph: one launch instead of hundreds.

    graph = DecodeGraph(model, cache)        # while the cache is empty, else capture copies it
    logits_BV = model.prefill(tokens_BT, cache, last_only=True)[:, 0]
    logits_BV = graph.step(logits_BV.argmax(-1, keepdim=True))[:, 0]

A step launches about ten kernels for every (loop, layer). At small batches the launches take longer
than the kernels. Reset and prefill work in place, so the graph serves its cache for any sequences.
Shapes: B rows of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from apps.LT2.cache import ModelCache
from apps.LT2.transformer import LoopedTransformer

WARMUP_STEPS = 2  # the first one compiles and tunes kernels and loads libraries


class DecodeGraph:
    """`model.step` on one cache, captured. Capture restores the contents of the cache."""

    def __init__(self, model: LoopedTransformer, cache: ModelCache):
        """Capture a step; every row must have room for one more token."""
        device = model.tok_embeddings.weight.device
        self.model, self.cache = model, cache
        self.tokens_B1 = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            with on_side_stream():
                for _ in range(WARMUP_STEPS):
                    with cache.preserved():
                        model.step(self.tokens_B1, cache)
            # thread_local: other threads, such as a data loader's, may allocate meanwhile.
            capture = torch.cuda.graph(self.graph, capture_error_mode="thread_local")
            with cache.preserved(), capture:
                self.logits_B1V = model.step(self.tokens_B1, cache)

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Run `model.step`. The next call overwrites the logits (B, 1, V)."""
        self.cache.extend(range(self.cache.batch_size), [1] * self.cache.batch_size)
        self.tokens_B1.copy_(tokens_B1)
        self.graph.replay()
        return self.logits_B1V


@contextmanager
def on_side_stream() -> Iterator[None]:
    """Run on another stream, as capture does, to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
