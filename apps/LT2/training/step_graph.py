"""Run forward and backward of a training step as a CUDA graph: one launch instead of thousands.

A step of a looped model launches thousands of kernels, and launching them can take longer than
running them. A graph repeats the recorded launches, so all that differs between steps must be in
its input tensors. What the host decides (loops, layers, offsets) is part of its key.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from apps.LT2.batch import Batch
from apps.LT2.training.args import TrainArgs
from apps.LT2.transformer import LoopedTransformer
from lingua.logger import log_on_rank_0
from lingua.parallel.gradients import reshard

# The loss of each micro-batch, and the means over the step, by metric key.
Losses = tuple[list[Tensor], dict[str, Tensor]]
# Computes them from micro-batches and a divisor, and leaves the gradients in `.grad`.
Compute = Callable[[Sequence[Batch], Tensor], Losses]

WARMUP_STEPS = 2  # run without a graph: they tune kernels and compile
MAX_GRAPHS = 16  # each holds gradients of all weights
WINDOW = 500  # steps


def uses_step_graph(args: TrainArgs, device: torch.device) -> bool:
    """Return whether the steps of a run are CUDA graphs."""
    wanted = args.distributed.cuda_graph and device.type == "cuda"
    return wanted and why_no_step_graph(args) is None


def why_no_step_graph(args: TrainArgs) -> str | None:
    """Return the option that rules out CUDA graphs, and why; None if there is none."""
    distributed = args.distributed
    if args.data.doc_mask:
        return "data.doc_mask=true: the number of documents differs between steps"
    if distributed.tp_size > 1:
        return f"distributed.tp_size={distributed.tp_size}: its collectives are not captured"
    if distributed.reshard_between_loops and distributed.fsdp_type == "full_shard":
        return "distributed.reshard_between_loops=true: its gathers are not captured"
    return None


class StepGraphs:
    """Runs computations, each from its third call on as a CUDA graph.

    An eager step frees all graphs, because it needs as much memory as they keep, and together they
    might not fit. A run gives up graphs if fewer than half of WINDOW steps repeat one.
    """

    def __init__(self, model: LoopedTransformer):
        self.model = model
        self.has_given_up = False
        self.n_steps = self.n_replayed = 0  # in this window
        self.n_calls: Counter[Hashable] = Counter()
        self.graphs: dict[Hashable, StepGraph] = {}
        self.clear()

    def clear(self) -> None:
        """Free all graphs and their memory. Each is captured again at its next call."""
        for captured in self.graphs.values():
            captured.graph.reset()  # the traceback of an error may refer to it
        self.graphs.clear()
        # They never run at the same time, so they share the memory of their activations. A pool
        # that no graph uses any more cannot be used again.
        self.pool = torch.cuda.graph_pool_handle()

    def run(
        self, key: Hashable, compute: Compute, batches: Sequence[Batch], divisor: Tensor
    ) -> Losses:
        """Return the losses of `compute(batches, divisor)`. `.grad` must be None before.

        Computations with equal keys must launch the same kernels. The next call overwrites the
        gradients.
        """
        if self.n_steps == WINDOW:
            self._end_window()
        if self.has_given_up:
            return compute(batches, divisor)
        self.n_steps += 1
        self.n_calls[key] += 1
        is_full = len(self.graphs) == MAX_GRAPHS and key not in self.graphs
        if self.n_calls[key] <= WARMUP_STEPS or is_full:
            self.clear()
            return compute(batches, divisor)
        self.n_replayed += key in self.graphs
        if key not in self.graphs:
            self.graphs[key] = StepGraph(self.model, compute, batches, divisor, self.pool)
        return self.graphs[key].run(batches, divisor)

    def _end_window(self) -> None:
        """Give up, and free all graphs, if fewer than half of the window's steps repeated one."""
        if self.n_replayed < WINDOW / 2:
            self.has_given_up = True
            self.clear()
            log_on_rank_0(
                "distributed.cuda_graph=true has no effect from now on: only %d of the last %d "
                "steps repeated a graph. Steps differ in their loops, their layout and their "
                "offset of model.loop_loss_every, and at most %d graphs fit",
                *(self.n_replayed, WINDOW, MAX_GRAPHS),
                level=logging.WARNING,
            )
        self.n_steps = self.n_replayed = 0


class StepGraph:
    """The captured `compute` of one key."""

    def __init__(
        self,
        model: LoopedTransformer,
        compute: Compute,
        batches: Sequence[Batch],
        divisor: Tensor,
        pool: Any,  # of torch.cuda.graph_pool_handle
    ):
        self.batches = [(x.clone(), target.clone(), None) for x, target, _ in batches]
        self.divisor = divisor.clone()
        self.graph = torch.cuda.CUDAGraph()
        reshard(model)  # so that the graph gathers the weights
        # thread_local: other threads, such as a data loader's, may allocate meanwhile.
        try:
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.losses, self.means = compute(self.batches, self.divisor)
        except BaseException:
            self.graph.reset()  # the traceback refers to it, and NCCL would wait for it
            raise
        self.gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]

    def run(self, batches: Sequence[Batch], divisor: Tensor) -> Losses:
        """Return the losses of other batches of the same shapes, and set the gradients."""
        for (x, target, _), (new_x, new_target, _) in zip(self.batches, batches, strict=True):
            assert x.shape == new_x.shape, f"a batch of {new_x.shape} for a graph of {x.shape}"
            x.copy_(new_x)
            target.copy_(new_target)
        self.divisor.copy_(divisor)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        means = {key: mean.clone() for key, mean in self.means.items()}
        return [loss.clone() for loss in self.losses], means
