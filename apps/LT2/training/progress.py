"""Compute the training metrics of a run: averages, throughput, utilization, time left."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from apps.LT2.training.trainer import StepResult, Trainer
from lingua.distributed import dist_mean, get_world_size
from lingua.metrics import GPUMemoryMonitor, peak_flops
from lingua.parallel.args import resolve_dtype


@dataclass
class Progress:
    """Collects step results; `record` averages those since the last call.

    Counts FLOPs and seconds in the train state. A checkpoint older than these counts gets the
    FLOPs of its tokens, and its run has no time/elapsed.
    """

    trainer: Trainer
    flops_per_token: dict[int, int]  # of the whole model, in forward and backward, by loops
    _results: list[StepResult] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)  # end of the counted time
    _seconds: float = 0.0  # counted since the last record
    _flops: int = 0  # of the model since the last record, on all ranks
    _seconds_per_flop: float = 0.0  # in the last record

    def __post_init__(self):
        device, model_dtype = self.trainer.device, self.trainer.args.distributed.model_dtype
        self.memory = GPUMemoryMonitor(device)
        self.peak_flops = peak_flops(self.memory.name, resolve_dtype(model_dtype, device.type))

    def add(self, result: StepResult) -> None:
        state = self.trainer.state
        if state.n_flops is None:
            n_before = (state.n_tokens or 0) - self.trainer.tokens_per_step
            state.n_flops = n_before * self.flops_per_token[result.n_loops]
        n_flops = self.trainer.tokens_per_step * self.flops_per_token[result.n_loops]
        state.n_flops += n_flops
        self._flops += n_flops
        self._results.append(result)

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._since
        if self.trainer.state.seconds is not None:
            self.trainer.state.seconds += now - self._since
        self._since = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from the training time."""
        self._count_time()
        yield
        self._since = time.perf_counter()

    def record(self) -> dict[str, Any]:
        """Return the metrics of the steps since the last record, at least one. A collective.

        The losses and loops come from the train state, which includes steps before a resume.
        """
        state, results, n_steps = self.trainer.state, self._results, len(self._results)
        loss = _mean(state.losses)  # waits for the device
        means = {key: _mean(numbers) for key, numbers in state.means.items()}
        mixer_norms = results[-1].mixer_grad_norms
        self._count_time()
        seconds = self._seconds / n_steps
        tokens_per_s, world_size = self.trainer.tokens_per_step / seconds, get_world_size()
        flops = self._flops / self._seconds / world_size
        self._seconds_per_flop = self._seconds / self._flops
        record = {
            "global_step": state.step,
            "acc_step": 0,
            "loss/out": loss,
            **means,
            "speed/wps": tokens_per_s / world_size,
            "speed/tokens_per_s": tokens_per_s,
            "speed/FLOPS": flops,
            "speed/curr_iter_time": seconds,
            "speed/data_load_time": sum(r.data_seconds for r in results) / n_steps,
            "optim/grad_norm": results[-1].grad_norm,
            **{f"optim/grad_norm_{name}": norm for name, norm in mixer_norms.items()},
            "optim/lr": results[-1].lr,
            "optim/total_tokens": state.n_tokens,
            "optim/total_flops": float(state.n_flops or 0),  # wandb has 64-bit integers
            **self.memory.metrics(),
        }
        if self.peak_flops is not None:
            record["speed/mfu"] = flops / self.peak_flops
        if state.seconds is not None:
            record["time/elapsed"] = state.seconds
        self.memory.reset_peak_stats()
        self._results, self._seconds, self._flops = [], 0.0, 0
        return record

    def line(self, record: dict[str, Any]) -> str:
        """Format a record as one line of the log."""
        steps, step = self.trainer.args.steps, record["global_step"]
        flops_left = self.trainer.tokens_per_step * self.trainer.model.loop_plan.total(
            self.flops_per_token.__getitem__, step, steps
        )
        parts = [
            f"step {step}/{steps}",
            f"loss {record['loss/out']:.4f}",
            *([f"acc {record['acc/out']:.4f}"] if "acc/out" in record else []),
            f"lr {record['optim/lr']:.2e}",
            f"grad {record['optim/grad_norm']:.3f}",
            f"{_si(record['speed/tokens_per_s'])} tokens/s",
        ]
        if "optim/loops" in record:
            parts.append(f"loops {record['optim/loops']:.3g}")
        if "speed/mfu" in record:
            parts.append(f"mfu {100 * record['speed/mfu']:.1f}%")
        # torch doesn't count what the kernels of a CUDA graph use as active.
        kind = "active" if self.trainer.graphs is None else "reserved"
        if f"memory/max_{kind}_gib" in record:
            parts.append(f"{record[f'memory/max_{kind}_gib']:.1f} GiB")
        parts.append(f"eta {timedelta(seconds=round(flops_left * self._seconds_per_flop))}")
        return "  ".join(parts)


def _mean(losses: list[Tensor]) -> float:
    """Average over steps and ranks; NaN if no step had a target."""
    if not losses:
        return math.nan
    return dist_mean(torch.stack(losses).mean()).item()


def _si(x: float) -> str:
    """Format with three digits and a unit: 12.3M."""
    for unit in ("", "k", "M"):
        if x < 999.5:  # above, three digits are 1000
            return f"{x:.3g}{unit}" if unit else f"{x:.0f}"
        x /= 1000
    return f"{x:.3g}G"
