"""Run one optimizer step: forward and backward of the micro-batches, clip, update."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from apps.LT2.batch import Batch, count_targets, to_device
from apps.LT2.parallel import set_gradient_sync
from apps.LT2.training.args import TrainArgs
from apps.LT2.training.step_graph import Losses, StepGraphs, uses_step_graph
from apps.LT2.transformer import LoopedTransformer
from lingua.dataloader.reshard import DataState, reshard_streams
from lingua.distributed import (
    clip_grad_norm_,
    first_nonfinite,
    get_device,
    get_dp_rank_and_degree,
    get_global_rank,
    run_and_average,
    sync_replicated_grads,
)
from lingua.errors import UserError
from lingua.logger import log_on_rank_0
from lingua.optim import NonfiniteGuard, ScheduledLR, step_if

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """The state of a run besides weights and optimizer. Each data-parallel rank saves its own."""

    step: int  # finished optimizer steps
    acc_step: int  # finished micro-batches of the current step; 0 in every checkpoint
    data_loader_state: DataState
    scheduler: ScheduledLR
    # None after loading an older checkpoint, as are n_flops, seconds and n_gates
    n_tokens: int | None = 0  # read by all ranks
    n_flops: int | None = 0  # of the model, in forward and backward, on all ranks
    seconds: float | None = 0.0  # of training, without evaluations and checkpoints
    n_gates: int | None = 0  # first gates (rows of rho) trained, in steps or in initial weights
    # One loss for each step since the last log record, on the device. Its mean over ranks is the
    # loss of the step. Steps without targets have none.
    losses: list[Tensor] = field(default_factory=list)
    means: dict[str, list[Tensor]] = field(default_factory=dict)  # the same, by metric key

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "acc_step": self.acc_step,
            "data_loader_state": self.data_loader_state,
            "scheduler": self.scheduler.state_dict(),
            "n_tokens": self.n_tokens,
            "n_flops": self.n_flops,
            "seconds": self.seconds,
            "n_gates": self.n_gates,
            "losses": _to_numbers(self.losses),
            "means": {key: _to_numbers(numbers) for key, numbers in self.means.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
        self.acc_step = state_dict["acc_step"]
        self.data_loader_state = state_dict["data_loader_state"]
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.n_tokens = state_dict.get("n_tokens")
        self.n_flops = state_dict.get("n_flops")
        self.seconds = state_dict.get("seconds")
        self.n_gates = state_dict.get("n_gates")
        self.losses = _to_tensors(state_dict["losses"])
        self.means = {key: _to_tensors(numbers) for key, numbers in _means(state_dict).items()}

    def load_state_dicts(self, states: list[dict[str, Any]], rank: int, n_ranks: int) -> None:
        """Resume from another number of ranks: keep the data and losses of all of them."""
        loaders = [state["data_loader_state"] for state in states]
        losses = zip(*(state["losses"] for state in states), strict=True)
        means = {
            key: zip(*(_means(state)[key] for state in states), strict=True)
            for key in _means(states[0])
        }
        self.load_state_dict(
            {
                **states[rank % len(states)],
                "data_loader_state": reshard_streams(loaders, rank, n_ranks),
                "losses": [fmean(of_ranks) for of_ranks in losses],
                "means": {key: [fmean(l) for l in of_ranks] for key, of_ranks in means.items()},
            }
        )

    def clear_losses(self) -> None:
        self.losses.clear()
        self.means.clear()


def _means(state_dict: dict[str, Any]) -> dict[str, list[float]]:
    """Return the means of a checkpoint; older ones have only the mixers' own losses, or none."""
    older = {f"loss/{name}": ls for name, ls in state_dict.get("mixer_losses", {}).items()}
    return state_dict.get("means", older)


def _to_numbers(losses: list[Tensor]) -> list[float]:
    return [loss.item() for loss in losses]


def _to_tensors(numbers: list[float]) -> list[Tensor]:
    return [torch.tensor(number, device=get_device()) for number in numbers]


def every_n_steps(
    train_state: TrainState, freq: int, acc_step: int | None = None, acc_freq: int | None = None
) -> bool:
    """Return whether `freq` divides the step; 0 never does.

    With `acc_step`, only at that micro-batch; with `acc_freq`, only at its multiples.
    """
    if freq < 1 or train_state.step % freq:
        return False
    if acc_step is not None:
        return train_state.acc_step == acc_step
    return acc_freq is None or train_state.acc_step % acc_freq == 0


@dataclass(frozen=True)
class StepResult:
    grad_norm: float  # of the language-model loss, before clipping
    mixer_grad_norms: dict[str, float]  # of the mixers' own losses, by name, before clipping
    lr: float  # used in this step
    data_seconds: float  # time spent waiting for the data loader
    n_loops: int  # T


@dataclass
class Trainer:
    """Takes optimizer steps. Updates `model`, `optimizer` and `state` in place."""

    args: TrainArgs
    model: LoopedTransformer
    optimizer: Optimizer
    state: TrainState
    batches: Iterator[tuple[Any, Any]]
    mesh: DeviceMesh | None
    device: torch.device
    # Called with the first micro-batch before its forward.
    before_step: Callable[[Batch], None] | None = None
    # Called for each micro-batch with the sum of its nats, a tensor, and the number of its targets.
    after_micro_batch: Callable[[Tensor, int], None] | None = None

    def __post_init__(self) -> None:
        args, (_, degree) = self.args, get_dp_rank_and_degree(self.mesh)
        tokens_per_batch = args.data.batch_size * args.data.seq_len
        self.tokens_per_step = tokens_per_batch * args.grad_acc_steps * degree
        if self.state.n_tokens is None:
            self.state.n_tokens = self.state.step * self.tokens_per_step
        if self.state.n_gates is None:
            self.state.n_gates = args.model.loop_count
        self.guard = NonfiniteGuard(args.optim.skip_nonfinite)
        # Listed now: while FSDP's units are gathered, the model has other tensors as parameters.
        self.own_weights = self.model.own_loss_parameters()
        only_own = {p for weights in self.own_weights.values() for p in weights}
        self.weights = [p for p in self.model.parameters() if p not in only_own]
        self.graphs = None
        if uses_step_graph(args, self.device):
            self.graphs = StepGraphs(self.model)

    def free_graphs(self) -> None:
        """Free the CUDA graphs, if there are any. Later steps run without graphs.

        The process group cannot end before: NCCL waits for graphs of its collectives.
        """
        if self.graphs is not None:
            self.graphs.clear()
        self.graphs = None

    def step(self) -> StepResult:
        """Take one optimizer step. A collective. A step without targets updates nothing."""
        began = time.perf_counter()
        # An error in one rank's data is raised on all ranks, before they wait in a collective.
        micro_batches, n_targets = run_and_average(self._read_and_count)
        data_seconds = time.perf_counter() - began
        lr = self.optimizer.param_groups[0]["lr"]
        grad_norm, mixer_grad_norms = 0.0, {}
        self.model.begin_step(self.state.step, self.args.steps)
        n_loops = self.model.n_loops
        if self.model.loop_plan.varies:
            number = torch.full((), n_loops, dtype=torch.float32, device=self.device)
            self.state.means.setdefault("optim/loops", []).append(number)
        if n_targets:
            self._accumulate(micro_batches, n_targets)
            sync_replicated_grads(self.model, self.mesh)
            norms = self._clip()
            read_norms = _start_reading(norms)
            # The device decides whether to skip, so the update is launched before the host waits.
            step_if(norms.isfinite().all(), self.optimizer)
            grad_norm, *own_norms = read_norms()
            mixer_grad_norms = dict(zip(self.own_weights, own_norms, strict=True))
            if not self._skip(grad_norm, *own_norms):
                self.state.n_gates = max(self.state.n_gates or 0, n_loops)
                self.model.extend_gates(self.state.n_gates)
            self.optimizer.zero_grad()
        else:
            log_on_rank_0(
                "step %d skipped: no token has a target, since data.doc_mask=true and each of its "
                "documents has one token; use longer documents, or data.doc_mask=false",
                self.state.step + 1,
                level=logging.WARNING,
            )
        self.state.scheduler.step()
        self.state.step += 1
        self.state.n_tokens = (self.state.n_tokens or 0) + self.tokens_per_step
        return StepResult(grad_norm, mixer_grad_norms, lr, data_seconds, n_loops)

    def _accumulate(self, micro_batches: list[Any], n_targets: float) -> None:
        """Accumulate the gradients of the step's loss, and add its losses to the state.

        The loss of a step is the sum of nats over the number of targets, in all micro-batches and
        ranks. `n_targets` is the mean of that number over micro-batches and ranks. Each micro-batch
        divides its nats by it, so that the mean over micro-batches and ranks is the step's loss. A
        mixer's own loss is a mean over tokens. All micro-batches have the same number of tokens, so
        the mean over micro-batches is right.
        """
        n_micro, model = len(micro_batches), self.model
        doc_mask, is_task = self.args.data.doc_mask, self.args.data.task is not None
        divisor = torch.full((), n_targets, dtype=torch.float32, device=self.device)
        batches = [to_device(views, doc_mask, self.device) for views in micro_batches]
        counts = [count_targets(views) for views in micro_batches]
        if self.before_step is not None:
            self.before_step(batches[0])
        n_answers = counts if is_task else [None] * n_micro
        compute = partial(self._forward_and_backward, n_answers)
        if self.graphs is None:
            losses, means = compute(batches, divisor)
        else:
            key = (model.computation(), *n_answers)
            losses, means = self.graphs.run(key, compute, batches, divisor)
        if self.after_micro_batch is not None:
            for micro, (loss, count) in enumerate(zip(losses, counts, strict=True)):
                self.state.acc_step = (micro + 1) % n_micro
                self.after_micro_batch(loss.double() * n_targets, count)
        self.state.losses.append(sum(losses, start=torch.zeros((), device=self.device)) / n_micro)
        for key, mean in means.items():
            self.state.means.setdefault(key, []).append(mean)

    def _forward_and_backward(
        self, n_answers: Sequence[int | None], batches: Sequence[Batch], divisor: Tensor
    ) -> Losses:
        """Add the gradients of all micro-batches to `.grad`, and return their losses.

        `n_answers` are the targets of each micro-batch whose accuracy is measured, or None.
        """
        n_micro, losses = len(batches), []
        totals: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            set_gradient_sync(self.model, micro == n_micro - 1)
            self.model.n_answers = n_answers[micro]
            loss = self.model(*batch, divisor)
            (loss / n_micro).backward()
            losses.append(loss.detach())
            own = {f"loss/{name}": loss for name, loss in self.model.mixer_losses.items()}
            for key, mean in (own | self.model.loop_metrics).items():
                totals[key] = totals.get(key, 0) + mean
        return losses, {key: total / n_micro for key, total in totals.items()}

    def _read_and_count(self) -> tuple[list[Any], float]:
        """Read the micro-batches of a step, and return them and their mean number of targets."""
        micro_batches = self._read_micro_batches()
        return micro_batches, fmean(map(count_targets, micro_batches))

    def _read_micro_batches(self) -> list[Any]:
        micro_batches = []
        for _ in range(self.args.grad_acc_steps):
            views, self.state.data_loader_state = next(self.batches)
            self._check_tokens(views)
            micro_batches.append(views)
        return micro_batches

    def _check_tokens(self, views_BTN: Any) -> None:
        """Raise UserError for tokens outside the vocabulary, which would crash a CUDA kernel."""
        vocab_size, data = self.args.model.vocab_size, self.args.data
        smallest, largest = views_BTN[..., 0].min(), views_BTN[..., :2].max()
        if smallest < 0 or largest >= vocab_size:
            token = largest if smallest >= 0 else smallest
            raise UserError(
                f"data.sources: token {token} is outside the vocabulary of data.tokenizer.name="
                f"{data.tokenizer.name} (model.vocab_size={vocab_size}): a .tokens file is "
                "damaged; delete them and run python setup/tokenize_data.py again"
            )

    def _clip(self) -> Tensor:
        """Clip the gradients of each loss to optim.clip, and return the norms before clipping.

        The first norm is of the language-model loss, the others of `own_weights`. Clipping all
        gradients together would let a mixer's own loss shrink the steps of weights that it doesn't
        train.
        """
        clip = self.args.optim.clip
        groups = (self.weights, *self.own_weights.values())
        return torch.stack([clip_grad_norm_(weights, clip) for weights in groups])

    def _skip(self, *grad_norms: float) -> bool:
        """Return whether the step was skipped, because of NaN or infinite gradients.

        FloatingPointError if optim.skip_nonfinite doesn't allow another skipped step.
        """
        grad_norm = next((norm for norm in grad_norms if not math.isfinite(norm)), grad_norms[0])
        try:
            skipped = self.guard.skip(grad_norm)
        except FloatingPointError as error:
            where = first_nonfinite(self.model) or "not on this rank"
            raise FloatingPointError(
                f"step {self.state.step + 1}, rank {get_global_rank()}: {error}; first tensor "
                f"with NaN or infinity: {where}. The last checkpoint is unchanged."
            ) from None
        if skipped:
            logger.warning("step %d skipped: gradient norm %s", self.state.step + 1, grad_norm)
        return skipped


def _start_reading(tensor: Tensor) -> Callable[[], list[float]]:
    """Copy a tensor to the host. The result waits for the copy, but not for later kernels."""
    host = tensor.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream().record_event() if tensor.is_cuda else None

    def read() -> list[float]:
        if copied is not None:
            copied.synchronize()
        return host.tolist()

    return read
