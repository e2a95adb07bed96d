"""Optimizer and learning rate: which parameters decay, how the rate moves, when a step is skipped.

Learning rate schedules are functions of s, the number of the optimizer step counted from 1, and
return a factor for `optim.lr`. All but `constant` rise to 1 over `warmup` steps. They have no jump
but the restarts that `cycle_length` asks for, never go below `lr_min_ratio` after the warmup, and
stay as they are after the last step, except that inv_sqrt goes on. linear, wsd, and a cosine of
whole cycles end at `lr_min_ratio`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lingua.errors import UserError
from lingua.muon import MOMENTUM_BUFFER, Muon

logger = logging.getLogger(__name__)

OPTIMIZERS = ("adamw", "muon")
ANNEALING_STEP = 1000  # kept so that Lingua's YAML files load; it never had an effect


@dataclass
class MuonArgs:
    momentum: float = 0.95  # of the gradient, Nesterov's
    newton_schulz_steps: int = 5  # iterations that orthogonalize an update

    def __post_init__(self):
        _require(0 <= self.momentum < 1, "muon.momentum", self.momentum, "from 0 to below 1")
        steps = self.newton_schulz_steps
        _require(1 <= steps <= 20, "muon.newton_schulz_steps", steps, "from 1 to 20")


@dataclass
class OptimArgs:
    # adamw; or muon for the weight matrices of the layers, and AdamW for all else (see muon.py)
    name: str = "adamw"
    muon: MuonArgs = field(default_factory=MuonArgs)
    lr: float = 3e-4  # peak learning rate
    weight_decay: float = (
        0.1  # decay of weight matrices; norms, gates, biases, convolutions have none
    )
    epsilon: float = 1e-8  # AdamW's term in the denominator
    beta1: float = 0.9  # AdamW's decay of the gradient mean
    beta2: float = 0.95  # AdamW's decay of the squared gradient mean
    clip: float | None = 1.0  # largest norm of the whole gradient; 0 or null does not clip
    scheduler: str = "cosine"  # constant, linear, inv_sqrt, cosine or wsd
    warmup: int = 2000  # steps of linear rise to lr; 0 starts at lr; `constant` has no warmup
    lr_min_ratio: float = 0.1  # final learning rate / lr, 0 to 1; `constant` stays at lr
    # cosine, wsd: length of a cycle / steps; 0.5 restarts once, 1.0 never. A cosine over 1.0 ends
    # above lr_min_ratio
    cycle_length: float = 1.0
    cosine_theta: float = 1.0  # cosine: exponent on the progress; above 1 stays high for longer
    annealing_step: int = ANNEALING_STEP  # no effect, and no other value is accepted
    decay_fraction: float = 0.1  # wsd: share of the steps so far that decays, below cycle_length
    exp_factor: float = 0.5  # inv_sqrt: the rate falls as step ** -exp_factor
    # steps in a row whose gradient is NaN or infinite that are skipped; one more stops the run
    skip_nonfinite: int = 0

    def __post_init__(self):
        _require(self.name in OPTIMIZERS, "name", self.name, " or ".join(OPTIMIZERS))
        if self.name != "muon":
            _require(self.muon == MuonArgs(), "muon", self.muon, "left out without optim.name=muon")
        _require(self.lr > 0, "lr", self.lr, "above 0")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _require(self.epsilon > 0, "epsilon", self.epsilon, "above 0")
        _require(0 <= self.beta1 < 1, "beta1", self.beta1, "from 0 to below 1")
        _require(0 <= self.beta2 < 1, "beta2", self.beta2, "from 0 to below 1")
        _require(self.clip is None or self.clip >= 0, "clip", self.clip, "0 or more, or null")
        _require(self.scheduler in SCHEDULERS, "scheduler", self.scheduler, ", ".join(SCHEDULERS))
        _require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        _require(0 <= self.lr_min_ratio <= 1, "lr_min_ratio", self.lr_min_ratio, "from 0 to 1")
        _require(self.cycle_length > 0, "cycle_length", self.cycle_length, "above 0")
        _require(self.cosine_theta > 0, "cosine_theta", self.cosine_theta, "above 0")
        _require(self.exp_factor > 0, "exp_factor", self.exp_factor, "above 0")
        _require(self.skip_nonfinite >= 0, "skip_nonfinite", self.skip_nonfinite, "0 or more")
        _require(
            self.annealing_step == ANNEALING_STEP,
            "annealing_step",
            self.annealing_step,
            f"left out (it has no effect; only {ANNEALING_STEP} is accepted)",
        )
        for name, readers in READ_BY.items():
            if self.scheduler not in readers:
                unset = getattr(OptimArgs, name)
                allowed = (unset, *SAYS_CONSTANT.get(name, ()))
                wanted = (
                    f"left out, or {' or '.join(map(str, allowed))}, under optim.scheduler="
                    f"{self.scheduler}: only optim.scheduler={' and '.join(readers)} read it"
                )
                value = getattr(self, name)
                _require(value in allowed, name, value, wanted)
        if self.scheduler == "wsd":
            _require(self.cycle_length <= 1, "cycle_length", self.cycle_length, "at most 1 for wsd")
            _require(
                0 < self.decay_fraction < self.cycle_length,
                "decay_fraction",
                self.decay_fraction,
                f"above 0 and below optim.cycle_length={self.cycle_length}",
            )


def _require(ok: bool, field: str, value: Any, wanted: str) -> None:
    if not ok:
        raise UserError(f"optim.{field}={value}: must be {wanted}")


# ---- schedules: step is counted from 1, the result multiplies optim.lr


def lr_linear(step: int, warmup: int, n_steps: int, min_ratio: float) -> float:
    if step < warmup:
        return step / warmup
    return 1 - (1 - min_ratio) * _progress(step, warmup, n_steps)


def lr_inv_sqrt(step: int, warmup: int, exp_factor: float, min_ratio: float) -> float:
    if step < warmup:
        return step / warmup
    start = max(warmup, 1)
    return max((start / max(step, start)) ** exp_factor, min_ratio)


def lr_cosine(
    step: int, warmup: int, n_steps: int, cycle_length: float, theta: float, min_ratio: float
) -> float:
    if step < warmup:
        return step / warmup
    cycles = _progress(step, warmup, n_steps) ** theta / cycle_length
    done = cycles - _cycles_before(cycles)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def lr_wsd(
    step: int,
    warmup: int,
    n_steps: int,
    decay_fraction: float,
    cycle_length: float,
    min_ratio: float,
) -> float:
    """Warm up, stay, decay: each cycle ends in a decay over `decay_fraction` of the steps so far.

    The decay is harmonic (1 / lr grows linearly), which cannot reach 0: with min_ratio 0 it is
    linear.
    """
    if step < warmup:
        return step / warmup
    step = min(step, n_steps)
    cycle = n_steps * cycle_length
    begin = _cycles_before(step / cycle) * cycle
    end = min(begin + cycle, n_steps)
    # A decay lasts one step at least, and starts after warmup and after the cycle before.
    start = max(end - max(end * decay_fraction, 1), begin, warmup)
    done = _progress(step, start, end)
    if min_ratio == 0:
        return 1 - done
    return 1 / (done / min_ratio + 1 - done)


def lr_constant(step: int) -> float:
    return 1.0


def _progress(step: float, start: float, end: float) -> float:
    """How far step is on the way from start to end, 0 to 1; 0 where there is no way to go."""
    if end <= start:
        return 0.0
    return min(max((step - start) / (end - start), 0.0), 1.0)


def _cycles_before(cycles: float) -> int:
    """Whole cycles that ended before this point; the end of a cycle still belongs to it."""
    return max(math.ceil(round(cycles, 9)) - 1, 0)  # rounded: 1 / (1 / 49) exceeds 49


SCHEDULERS: dict[str, Callable[..., float]] = {
    "constant": lr_constant,
    "linear": lr_linear,
    "inv_sqrt": lr_inv_sqrt,
    "cosine": lr_cosine,
    "wsd": lr_wsd,
}


READ_BY = {  # options that not every schedule reads
    "warmup": ("linear", "inv_sqrt", "cosine", "wsd"),
    "lr_min_ratio": ("linear", "inv_sqrt", "cosine", "wsd"),
    "cycle_length": ("cosine", "wsd"),
    "cosine_theta": ("cosine",),
    "decay_fraction": ("wsd",),
    "exp_factor": ("inv_sqrt",),
}
SAYS_CONSTANT = {"warmup": (0,), "lr_min_ratio": (1.0,)}  # values that mean what `constant` does


def build_lr_fn(args: OptimArgs, n_steps: int) -> Callable[[int], float]:
    """The factor on optim.lr at optimizer step s = 1, 2, ..., n_steps (and beyond)."""
    options: dict[str, dict[str, Any]] = {
        "constant": {},
        "linear": {"n_steps": n_steps},
        "inv_sqrt": {"exp_factor": args.exp_factor},
        "cosine": {
            "n_steps": n_steps,
            "cycle_length": args.cycle_length,
            "theta": args.cosine_theta,
        },
        "wsd": {
            "n_steps": n_steps,
            "cycle_length": args.cycle_length,
            "decay_fraction": args.decay_fraction,
        },
    }
    chosen = options[args.scheduler]
    if args.scheduler != "constant":
        chosen |= {"warmup": args.warmup, "min_ratio": args.lr_min_ratio}
        if args.warmup >= n_steps:
            reached = args.lr * n_steps / max(args.warmup, 1)
            logger.warning(
                f"optim.warmup={args.warmup} is not below steps={n_steps}: "
                f"the learning rate only rises, to {reached:.3g}"
            )
    return partial(SCHEDULERS[args.scheduler], **chosen)


class ScheduledLR(LambdaLR):
    """LambdaLR whose only state is the number of steps done.

    Loading sets the optimizer's rate at once, so that the first step after a resume has the right
    one; peak rate and shape come from the config of the run that resumes.
    """

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        rates = [
            b * f(self.last_epoch) for b, f in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


# ---- parameters


EMBEDDING_NAMES = ("tok_embeddings", "output")  # of the vocabulary
VECTOR_NAMES = ("rho", "A_log", "D", "dt_bias", "bias")


def is_matrix(name: str, param: Tensor) -> bool:
    """Whether a parameter is a weight matrix: it decays, and FSDP shards it and casts it.

    Matrices are the 2-D weights of projections, FFN, embeddings and head. All others (norms, gates
    and biases, A_log, D, dt_bias, convolutions, the (loops, dim) rho) are "vectors": few numbers
    that stay whole and in fp32 on every rank.
    """
    if param.ndim != 2 or "norm" in name or "conv" in name:
        return False
    leaf = name.rsplit(".", 1)[-1]
    return not any(leaf == v or leaf.endswith(f"_{v}") for v in VECTOR_NAMES)


def is_hidden_matrix(name: str, param: Tensor) -> bool:
    """Whether a parameter is a matrix of a layer, and so one that Muon is for."""
    return is_matrix(name, param) and name.split(".")[0] not in EMBEDDING_NAMES


def build_param_groups(
    model: nn.Module, weight_decay: float, *, muon: bool = False
) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; DTensors share a group only with those of their mesh.

    `muon` puts the matrices of the layers into groups of their own.
    """
    groups: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            by_muon = muon and is_hidden_matrix(name, param)
            n_mesh_dims = param.device_mesh.ndim if isinstance(param, DTensor) else 0
            key = (by_muon, is_matrix(name, param), n_mesh_dims)
            groups.setdefault(key, []).append(param)
    return [
        {"params": params, "weight_decay": weight_decay if matrix else 0.0, "muon": by_muon}
        for (by_muon, matrix, _), params in sorted(
            groups.items(), key=lambda item: item[0], reverse=True
        )
    ]


def build_optimizer(
    model: nn.Module, args: OptimArgs, n_steps: int
) -> tuple[Optimizer, ScheduledLR]:
    """The optimizer and its schedule. Build them after the model was parallelized and
    materialized."""
    groups = build_param_groups(model, args.weight_decay, muon=args.name == "muon")
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    options = {
        "lr": args.lr,
        "betas": (args.beta1, args.beta2),
        "eps": args.epsilon,
        "fused": fused,
    }
    if args.name == "muon":
        optimizer = Muon(groups, **options, **asdict(args.muon))
    else:
        optimizer = AdamW(groups, **options)
    lr_fn = build_lr_fn(args, n_steps)
    # The scheduler counts steps done: the step that it sets the rate for is the next one.
    return optimizer, ScheduledLR(optimizer, lambda done: lr_fn(done + 1))


def state_fields(optimizer: Optimizer) -> dict[nn.Parameter, set[str]]:
    """Names of the tensors that the optimizer keeps for a parameter once it has moved it."""
    return {
        param: {MOMENTUM_BUFFER} if group.get("muon") else {"step", "exp_avg", "exp_avg_sq"}
        for group in optimizer.param_groups
        for param in group["params"]
    }


class NonfiniteGuard:
    """Decides whether an optimizer step is skipped because its gradient is not finite.

    The norm of the whole gradient is the same number on every rank, so all ranks decide alike.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.in_a_row = 0

    def skip(self, grad_norm: float) -> bool:
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            raise FloatingPointError(
                f"gradient norm is {grad_norm} in {self.in_a_row} steps in a row "
                f"(optim.skip_nonfinite={self.limit})"
            )
        return True
