"""Build the optimizer and the learning rate schedule, and skip steps with a non-finite gradient.

A schedule maps the optimizer step s = 1, 2, ... to a factor on `optim.lr`. All schedules except
`constant` rise linearly to 1 over `warmup` steps. After that they stay at or above `lr_min_ratio`.
linear, wsd and a cosine of whole cycles end at `lr_min_ratio`. Past the last step the factor stays
constant, except for inv_sqrt, which keeps falling.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lingua.errors import UserError
from lingua.logger import log_on_rank_0
from lingua.muon import MOMENTUM_BUFFER, Muon
from lingua.parallel.tensor_parallel import local_tensor

OPTIMIZERS = ("adamw", "muon")


@dataclass
class MuonArgs:
    momentum: float = 0.95  # Nesterov momentum
    newton_schulz_steps: int = 5  # iterations that orthogonalize an update

    def __post_init__(self):
        _require(0 <= self.momentum < 1, "muon.momentum", self.momentum, "from 0 to below 1")
        steps = self.newton_schulz_steps
        _require(1 <= steps <= 20, "muon.newton_schulz_steps", steps, "from 1 to 20")


@dataclass
class OptimArgs:
    name: str = "adamw"  # adamw; or muon: Muon for the layers' weight matrices, AdamW for the rest
    muon: MuonArgs = field(default_factory=MuonArgs)  # options of name=muon
    lr: float = 3e-4  # peak learning rate
    weight_decay: float = 0.1  # of weight matrices; norms, gates, biases, convolutions: none
    epsilon: float = 1e-8  # AdamW: added to the denominator
    beta1: float = 0.9  # AdamW: decay of the gradient mean
    beta2: float = 0.95  # AdamW: decay of the squared gradient mean
    clip: float | None = 1.0  # maximum norm of the whole gradient; 0 or null turns clipping off
    scheduler: str = "cosine"  # constant, linear, inv_sqrt, cosine or wsd
    warmup: int = 2000  # steps of linear warmup; 0 starts at lr; `constant` has no warmup
    rewarmup: int = 0  # steps of linear warmup after each change of model.loop_schedule
    lr_min_ratio: float = 0.1  # final learning rate / lr, 0 to 1; `constant` stays at lr
    # cosine, wsd: cycle length / steps; 0.5 restarts once, 1.0 never. A cosine with more than 1.0
    # ends above lr_min_ratio
    cycle_length: float = 1.0
    cosine_theta: float = 1.0  # cosine: exponent of the progress; above 1 decays later
    decay_fraction: float = 0.1  # wsd: decay length / steps so far, below cycle_length
    exp_factor: float = 0.5  # inv_sqrt: the rate falls as step ** -exp_factor
    # skip up to this many consecutive steps whose gradient is NaN or infinite, then stop the run
    skip_nonfinite: int = 0

    def __post_init__(self):
        _require(self.name in OPTIMIZERS, "name", self.name, " or ".join(OPTIMIZERS))
        _require(self.scheduler in SCHEDULERS, "scheduler", self.scheduler, ", ".join(SCHEDULERS))
        for name in ("lr", "epsilon", "cycle_length", "cosine_theta", "exp_factor"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("weight_decay", "warmup", "rewarmup", "skip_nonfinite"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "from 0 to below 1")
        _require(self.clip is None or self.clip >= 0, "clip", self.clip, "0 or more, or null")
        _require(0 <= self.lr_min_ratio <= 1, "lr_min_ratio", self.lr_min_ratio, "from 0 to 1")
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
        raise UserError(f"optim.{field}={value} must be {wanted}")


# ---- schedules: step counts from 1, the result multiplies optim.lr


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
    done = cycles - _completed_cycles(cycles)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def lr_wsd(
    step: int,
    warmup: int,
    n_steps: int,
    decay_fraction: float,
    cycle_length: float,
    min_ratio: float,
) -> float:
    """Warm up, stay constant, decay; each cycle ends with a decay.

    A decay lasts `decay_fraction` of the steps so far. It is harmonic (1 / lr grows linearly).
    With min_ratio 0, which a harmonic decay cannot reach, it is linear.
    """
    if step < warmup:
        return step / warmup
    step = min(step, n_steps)
    cycle = n_steps * cycle_length
    cycle_start = _completed_cycles(step / cycle) * cycle
    end = min(cycle_start + cycle, n_steps)
    # A decay lasts at least one step. It starts after the warmup and after the previous cycle.
    start = max(end - max(end * decay_fraction, 1), cycle_start, warmup)
    done = _progress(step, start, end)
    if min_ratio == 0:
        return 1 - done
    return 1 / (done / min_ratio + 1 - done)


def lr_constant(step: int) -> float:
    return 1.0


def _progress(step: float, start: float, end: float) -> float:
    """Return the fraction of the way from start to end, 0 to 1; 0 if the interval is empty."""
    if end <= start:
        return 0.0
    return min(max((step - start) / (end - start), 0.0), 1.0)


def _completed_cycles(cycles: float) -> int:
    """Return the number of cycles that ended before this point. A cycle includes its end."""
    return max(math.ceil(round(cycles, 9)) - 1, 0)  # rounded: 1 / (1 / 49) exceeds 49


SCHEDULERS: dict[str, Callable[..., float]] = {
    "constant": lr_constant,
    "linear": lr_linear,
    "inv_sqrt": lr_inv_sqrt,
    "cosine": lr_cosine,
    "wsd": lr_wsd,
}
OPTION_OF_PARAMETER = {  # a schedule reads the options that its parameters name
    "warmup": "warmup",
    "min_ratio": "lr_min_ratio",
    "cycle_length": "cycle_length",
    "theta": "cosine_theta",
    "decay_fraction": "decay_fraction",
    "exp_factor": "exp_factor",
}
MEANS_CONSTANT = {"lr_min_ratio": 1.0}  # a value that describes `constant`


def build_lr_fn(args: OptimArgs, n_steps: int) -> Callable[[int], float]:
    """Return the factor on optim.lr as a function of the optimizer step s = 1, 2, ..."""
    schedule = SCHEDULERS[args.scheduler]
    values = {p: getattr(args, option) for p, option in OPTION_OF_PARAMETER.items()}
    values["n_steps"] = n_steps
    parameters = inspect.signature(schedule).parameters
    if "warmup" in parameters and args.warmup >= n_steps:
        reached = args.lr * n_steps / max(args.warmup, 1)
        _warn(
            f"optim.warmup={args.warmup} is not below steps={n_steps}: "
            f"the learning rate only rises, to {reached:.3g}"
        )
    return partial(schedule, **{p: value for p, value in values.items() if p in parameters})


def with_restarts(
    lr_fn: Callable[[int], float], restarts: Sequence[int], warmup: int
) -> Callable[[int], float]:
    """Return `lr_fn` with `warmup` more steps of linear warmup after each of `restarts`."""

    def factor(step: int) -> float:
        since = [step - restart for restart in restarts if restart < step]
        return lr_fn(step) * min(1.0, min(since) / warmup if since and warmup else 1.0)

    return factor


def find_unused_options(args: OptimArgs) -> list[str]:
    """List the options that optimizer and scheduler don't read, whatever their values."""
    parameters = inspect.signature(SCHEDULERS[args.scheduler]).parameters
    unused = [option for name, option in OPTION_OF_PARAMETER.items() if name not in parameters]
    return unused if args.name == "muon" else ["muon", *unused]


def _warn_of_unused_options(args: OptimArgs) -> None:
    for option in find_unused_options(args):
        value = getattr(args, option)
        if option == "muon":
            if value != MuonArgs():
                _warn(f"optim.muon has no effect with optim.name={args.name}")
            continue
        # the default warmup of 2000 steps looks like a warmup too
        default = 0 if option == "warmup" else getattr(OptimArgs, option)
        if value not in (default, MEANS_CONSTANT.get(option)):
            _warn(f"optim.{option}={value} has no effect with optim.scheduler={args.scheduler}")


def _warn(message: str) -> None:
    log_on_rank_0(message, level=logging.WARNING)


class ScheduledLR(LambdaLR):
    """A LambdaLR whose only state is the number of completed steps.

    Loading sets the optimizer's learning rate, so the first step after a resume uses the right
    one. The peak rate and the schedule come from the config of the resumed run.
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


EMBEDDING_NAMES = ("tok_embeddings", "output")
NOT_MATRICES = ("rho", "A_log", "D", "dt_bias", "bias")


def is_matrix(name: str, param: Tensor) -> bool:
    """Return whether a parameter is a weight matrix, which decays and which FSDP shards and casts.

    Weight matrices are the 2-D weights of projections, FFN, embeddings and head. All others stay
    whole and in fp32 on every rank: norms, gates, biases, A_log, D, dt_bias, convolutions, and rho
    of shape (loops, dim).
    """
    if param.ndim != 2 or "norm" in name or "conv" in name:
        return False
    leaf = name.rsplit(".", 1)[-1]
    return not any(leaf == n or leaf.endswith(f"_{n}") for n in NOT_MATRICES)


def is_hidden_matrix(name: str, param: Tensor) -> bool:
    """Return whether a parameter is a weight matrix of a layer; Muon updates these."""
    return is_matrix(name, param) and name.split(".")[0] not in EMBEDDING_NAMES


def build_param_groups(
    model: nn.Module, weight_decay: float, *, muon: bool = False
) -> list[dict[str, Any]]:
    """Group parameters by weight decay and by mesh, since a group must not mix meshes.

    With `muon`, the weight matrices of layers get separate groups.
    """
    groups: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}  # (muon, decays, mesh dims)
    for name, param in model.named_parameters():
        if param.requires_grad:
            n_mesh_dims = param.device_mesh.ndim if isinstance(param, DTensor) else 0
            by_muon = muon and is_hidden_matrix(name, param)
            key = (by_muon, is_matrix(name, param), n_mesh_dims)
            groups.setdefault(key, []).append(param)
    return [
        {"params": groups[key], "weight_decay": weight_decay if key[1] else 0.0, "muon": key[0]}
        for key in sorted(groups, reverse=True)
    ]


UsedRows = Mapping[Tensor, Callable[[], int]]


class RowAdamW(AdamW):
    """AdamW that updates only those rows of a parameter that a step uses.

    `used_rows` returns how many of the first rows of a parameter the step uses. The other rows keep
    their value and state: they neither decay nor move by momentum, as parameters without a gradient
    do. Each row counts its own steps, so its first update is like a new parameter's. The state
    "step" then has shape (rows,), and () for all other parameters.
    """

    def __init__(self, groups: list[dict[str, Any]], used_rows: UsedRows, **options: Any):
        super().__init__(groups, **options)
        self.used_rows = used_rows

    def _init_group(self, group: dict[str, Any], params: list[Tensor], *lists: list[Tensor]) -> Any:
        for param in group["params"]:
            state = self.state.get(param)
            # A checkpoint may be from before or after a change of used_rows.
            if state and param in self.used_rows and not state["step"].ndim:
                state["step"] = state["step"].expand(len(param)).clone()
            elif state and param not in self.used_rows and state["step"].ndim:
                state["step"] = state["step"].max()
        has_complex = super()._init_group(group, params, *lists)
        for param in [p for p in params if p in self.used_rows]:
            i = next(i for i, p in enumerate(params) if p is param)
            state = cast(dict[str, Tensor], self.state[param])  # pyright: ignore[reportArgumentType]
            if not state["step"].ndim:  # new
                state["step"] = state["step"].expand(len(param)).clone()
                lists[-1][i] = state["step"]
            rows = range(self.used_rows[param]())
            for tensors in (params, *(tensors for tensors in lists if tensors)):
                tensors[i : i + 1] = [tensors[i][row] for row in rows]
        # The update is elementwise, and DTensor takes longer to dispatch it than a GPU to run it.
        for tensors in (params, *lists):
            tensors[:] = map(local_tensor, tensors)
        return has_complex


def build_optimizer(
    model: nn.Module,
    args: OptimArgs,
    n_steps: int,
    *,
    restarts: Sequence[int] = (),
    used_rows: UsedRows | None = None,
) -> tuple[Optimizer, ScheduledLR]:
    """Build the optimizer and its schedule for a model that is parallelized and materialized.

    `optim.rewarmup` follows each of `restarts`, numbers of completed steps. For `used_rows` see
    RowAdamW.
    """
    _warn_of_unused_options(args)
    groups = build_param_groups(model, args.weight_decay, muon=args.name == "muon")
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    betas = (args.beta1, args.beta2)
    options = {"lr": args.lr, "betas": betas, "eps": args.epsilon, "fused": fused}
    adamw = RowAdamW([g for g in groups if not g["muon"]], used_rows or {}, **options)
    optimizer = Muon(groups, adamw, **asdict(args.muon)) if args.name == "muon" else adamw
    lr_fn = with_restarts(build_lr_fn(args, n_steps), restarts, args.rewarmup)
    # torch takes a skipped first step for a wrong order of calls.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    # The scheduler counts completed steps, and sets the rate of the next one.
    return optimizer, ScheduledLR(optimizer, lambda done: lr_fn(done + 1))


def state_fields(optimizer: Optimizer) -> dict[nn.Parameter, set[str]]:
    """Return the names of the state tensors that the optimizer keeps for each parameter."""
    return {
        param: {MOMENTUM_BUFFER} if group.get("muon") else {"step", "exp_avg", "exp_avg_sq"}
        for group in optimizer.param_groups
        for param in group["params"]
    }


def step_if(condition: Tensor, optimizer: Optimizer) -> None:
    """Take the optimizer's step if a boolean scalar on its device is true.

    Fused AdamW reads it on the device. For other optimizers the host waits for it.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~condition).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
    elif condition:
        optimizer.step()


class NonfiniteGuard:
    """Count the steps that are skipped for a non-finite gradient; allow `limit` in a row.

    The gradient norm is the same number on every rank, so all ranks make the same decision.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.in_a_row = 0

    def skip(self, grad_norm: float) -> bool:
        """Return whether this step is skipped; FloatingPointError beyond the limit."""
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
