"""One optimizer step: micro-batches forward and backward, gradients joined, clipped and applied."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from apps.LT2.train_args import TrainArgs
from apps.LT2.transformer import LoopedTransformer
from lingua.data import PrefetchState, document_offsets
from lingua.distributed import (
    clip_grad_norm_,
    first_nonfinite,
    get_device,
    get_global_rank,
    run_together,
    set_gradient_sync,
    sync_replicated_grads,
)
from lingua.optim import NonfiniteGuard, ScheduledLR

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor, Tensor | None]  # x, target, cu_seqlens


@dataclass
class TrainState:
    """What a checkpoint holds beside weights and optimizer; one for each data-parallel rank."""

    step: int  # optimizer steps done
    acc_step: int  # micro-batches done of the next step; 0 in every checkpoint
    data_loader_state: PrefetchState
    scheduler: ScheduledLR
    # of the steps since the last log record, on the device; means over this rank's micro-batches
    losses: list[Tensor] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "acc_step": self.acc_step,
            "data_loader_state": self.data_loader_state,
            "scheduler": self.scheduler.state_dict(),
            "losses": [loss.item() for loss in self.losses],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
        self.acc_step = state_dict["acc_step"]
        self.data_loader_state = state_dict["data_loader_state"]
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.losses = [torch.tensor(loss, device=get_device()) for loss in state_dict["losses"]]


@dataclass(frozen=True)
class StepResult:
    grad_norm: float  # of the whole gradient, before clipping
    lr: float  # that the step was taken with
    data_seconds: float  # waiting for the loader


class Trainer:
    def __init__(
        self,
        args: TrainArgs,
        model: LoopedTransformer,
        optimizer: Optimizer,
        state: TrainState,
        batches: Iterator[tuple[Any, Any]],
        mesh: DeviceMesh | None,
        device: torch.device,
    ):
        self.args, self.model, self.optimizer, self.state = args, model, optimizer, state
        self.batches, self.mesh, self.device = batches, mesh, device
        self.guard = NonfiniteGuard(args.optim.skip_nonfinite)
        # Called with a micro-batch, before its forward; and with its loss, after its backward.
        self.before_micro_batch: Callable[[Batch], None] | None = None
        self.after_micro_batch: Callable[[Tensor], None] | None = None

    def step(self) -> StepResult:
        n_micro = self.args.grad_acc_steps
        total = torch.zeros((), device=self.device)
        began = time.perf_counter()
        # A rank that cannot read stops the others, too, before they wait for it in a collective.
        micro_batches = run_together(self._read_micro_batches)
        data_seconds = time.perf_counter() - began
        self.model.begin_step(self.state.step)
        for micro, views in enumerate(micro_batches):
            batch = to_device(views, self.args.data.doc_mask, self.device)
            if self.before_micro_batch is not None:
                self.before_micro_batch(batch)
            set_gradient_sync(self.model, micro == n_micro - 1)
            loss = self.model(*batch)
            (loss / n_micro).backward()
            total += loss.detach()
            self.state.acc_step = (micro + 1) % n_micro
            if self.after_micro_batch is not None:
                self.after_micro_batch(loss.detach())
        sync_replicated_grads(self.model, self.mesh)
        grad_norm = clip_grad_norm_(self.model, self.args.optim.clip).item()
        lr = self.optimizer.param_groups[0]["lr"]
        if not self._skip(grad_norm):
            self.optimizer.step()
        self.state.scheduler.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.state.losses.append(total / n_micro)
        return StepResult(grad_norm, lr, data_seconds)

    def _read_micro_batches(self) -> list[Any]:
        micro_batches = []
        for _ in range(self.args.grad_acc_steps):
            views, self.state.data_loader_state = next(self.batches)
            micro_batches.append(views)
        return micro_batches

    def _skip(self, grad_norm: float) -> bool:
        """Whether a step with NaN or infinite gradients is passed over; raises if it may not be."""
        try:
            skipped = self.guard.skip(grad_norm)
        except FloatingPointError as error:
            where = first_nonfinite(self.model) or "not on this rank"
            raise FloatingPointError(
                f"step {self.state.step + 1}, rank {get_global_rank()}: {error}; first tensor "
                f"with NaN or infinity: {where}. The last checkpoint is not touched."
            ) from None
        if skipped:
            logger.warning("step %d skipped: gradient norm %s", self.state.step + 1, grad_norm)
        return skipped


def to_device(views_BTN: Any, doc_mask: bool, device: torch.device) -> Batch:
    """The loader's int64 array (B, T, views) as tensors on the device, copied asynchronously.

    With doc_mask the batch becomes one packed row, and the last token of a document has no target.
    """
    views = torch.from_numpy(views_BTN)
    x, target = views[..., 0].contiguous(), views[..., 1].contiguous()
    cu_seqlens = None
    if doc_mask:
        starts = views[..., -1]
        target[:, :-1][starts[:, 1:] == 1] = -100
        cu_seqlens = copy_to(document_offsets(starts), device)
        x, target = x.view(1, -1), target.view(1, -1)
    return copy_to(x, device), copy_to(target, device), cu_seqlens


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
