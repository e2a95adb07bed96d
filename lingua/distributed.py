"""Set up the process group and the device mesh, and share values between ranks.

Everything here runs on CUDA (nccl), on CPU (gloo), and in a single process without a group.

Mesh dimensions: `dp_replicate` always; `dp_shard` if it is above 1 or nothing is sharded; `tp` if
it is above 1. As in Lingua, `fsdp_type: full_shard` with `dp_shard: 1` shards the weights over all
of `dp_replicate`. With `dp_shard` above 1 they are sharded over `dp_shard` ranks and replicated
over the others (HSDP).

Functions that Lingua has here are defined in `lingua/parallel/` and re-exported.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import multiprocessing.forkserver
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lingua.errors import MachineFault, UserError, find_disk_fault
from lingua.logger import log_on_rank_0
from lingua.parallel.args import DistributedArgs, needs_fsdp, unused_options
from lingua.parallel.gradients import (  # noqa: F401
    clip_grad_norm_,
    set_gradient_sync,
    sync_replicated_grads,
)
from lingua.parallel.parallelize import (  # noqa: F401
    check_model_value_range,
    default_fsdp_grouping_plan,
    first_nonfinite,
    get_default_policy,
    get_module,
    parallelize_model,
    set_module,
)
from lingua.parallel.ranks import (  # noqa: F401
    EnvironmentArgs,
    clean_env,
    get_device,
    get_global_rank,
    get_is_master,
    get_is_slurm_job,
    get_is_torch_run,
    get_local_rank,
    get_master_addr,
    get_master_port,
    get_world_size,
    setup_env,
)
from lingua.parallel.rendezvous import join_ranks
from lingua.parallel.signals import (  # noqa: F401
    blocked_parent_signals,
    init_signal_handler,
    requeue_slurm_job,
)
from lingua.parallel.torchrun import exit_with_torchrun, signal_when_torchrun_dies

logger = logging.getLogger(__name__)
T = TypeVar("T")


def fit_to_world(args: DistributedArgs, world_size: int) -> DistributedArgs:
    """Return a copy whose `dp_replicate` makes the mesh cover all processes."""
    if args.fsdp_type == "no_shard" and args.dp_shard > 1:
        raise UserError(
            f"distributed.dp_shard={args.dp_shard} with distributed.fsdp_type=no_shard: "
            "use fsdp_type=full_shard, or dp_shard=1"
        )
    rest = args.dp_shard * args.tp_size
    if world_size % rest:
        options = {"dp_shard": args.dp_shard, "tp_size": args.tp_size}
        product = " times ".join(f"distributed.{k}={n}" for k, n in options.items() if n > 1)
        raise UserError(
            f"{product} needs a multiple of {rest} processes, not {world_size}; on one machine use "
            f"torchrun --nproc-per-node {rest * max(world_size // rest, 1)}"
        )
    if args.dp_replicate * rest != world_size:
        logger.info(f"distributed.dp_replicate: {args.dp_replicate} -> {world_size // rest}")
    return replace(args, dp_replicate=world_size // rest)


def setup_torch_distributed(args: DistributedArgs) -> None:
    """Set torch's global switches and, if this run needs a process group, join it."""
    for warning in unused_options(args):
        log_on_rank_0(warning, level=logging.WARNING)
    signal_when_torchrun_dies()
    multiprocessing.set_start_method(args.spawn_method, force=True)
    if args.spawn_method == "forkserver":
        _start_forkserver()

    torch.backends.cuda.matmul.allow_tf32 = args.matmul_allow_tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (
        args.allow_bf16_reduced_precision_reduction
    )
    torch.autograd.set_detect_anomaly(args.detect_anomaly)

    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if needs_fsdp(args, get_world_size(), device.type) and not dist.is_initialized():
        with exit_with_torchrun():
            _init_process_group(device, timedelta(minutes=args.timeout_minutes))
        atexit.register(destroy_process_group)


def _start_forkserver() -> None:
    """Start the server before CUDA and before any thread, since its children copy its state."""
    try:
        with blocked_parent_signals():
            multiprocessing.forkserver.ensure_running()
    except OSError as error:
        if error.errno is not None:
            raise
        # "AF_UNIX path too long": the path of a socket has at most 107 characters.
        raise UserError(
            f"TMPDIR={tempfile.gettempdir()}: {error}; use a shorter one, or "
            "distributed.spawn_method=spawn"
        ) from None


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    common: dict[str, Any] = {"backend": "gloo", "timeout": timeout}
    if device.type == "cuda":
        common |= {"backend": "nccl", "device_id": device}
    rank, world_size = get_global_rank(), get_world_size()
    # An in-memory store needs no port, so it cannot clash with another job.
    store = dist.HashStore() if world_size == 1 else join_ranks(timeout)
    dist.init_process_group(store=store, rank=rank, world_size=world_size, **common)
    logger.info(f"process group: {common['backend']}, rank {rank} of {world_size} on {device}")


def destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- the mesh


def get_device_mesh(args: DistributedArgs) -> DeviceMesh | None:
    """Return the mesh of all ranks, or None in a process without a group."""
    if not dist.is_initialized():
        return None
    dims = {"dp_replicate": args.dp_replicate}
    if args.dp_shard > 1 or args.fsdp_type == "no_shard":
        dims["dp_shard"] = args.dp_shard
    if args.tp_size > 1:
        dims["tp"] = args.tp_size
    world_size = dist.get_world_size()
    if args.dp_replicate * args.dp_shard * args.tp_size != world_size:
        raise UserError(
            f"distributed: dp_replicate={args.dp_replicate} x dp_shard={args.dp_shard} x "
            f"tp_size={args.tp_size} must be the number of processes, {world_size}"
        )
    return init_device_mesh(get_device().type, tuple(dims.values()), mesh_dim_names=tuple(dims))


def get_dp_rank_and_degree(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Return this rank's data-parallel rank and their number. Ranks of a TP group share one."""
    rank, degree = 0, 1
    if mesh is not None:
        for dim in ("dp_replicate", "dp_shard"):
            if dim in (mesh.mesh_dim_names or ()):
                size = mesh[dim].size()
                rank, degree = rank * size + mesh.get_local_rank(dim), degree * size
    return rank, degree


# ---- values across ranks. Each function is a collective; a single process returns its input.


def _reduce(x: Tensor | float, op: dist.ReduceOp.RedOpType, mesh: DeviceMesh | None) -> Tensor:
    out = x.detach().clone() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
    if out.dtype is torch.float32 or not out.is_floating_point():
        out = out.double()  # token counts stay exact
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return out  # a host number stays there: a copy would wait for the device
    out = out.to(get_device())
    groups = [dist.group.WORLD] if mesh is None else mesh.get_all_groups()
    for group in groups:
        dist.all_reduce(out, op=op, group=group)
    return out


def dist_sum(x: Tensor | float, mesh: DeviceMesh | None = None) -> Tensor:
    return _reduce(x, dist.ReduceOp.SUM, mesh)


def dist_max(x: Tensor | float, mesh: DeviceMesh | None = None) -> Tensor:
    return _reduce(x, dist.ReduceOp.MAX, mesh)


def dist_mean(x: Tensor | float, mesh: DeviceMesh | None = None) -> Tensor:
    size = 1
    if dist.is_initialized():
        size = dist.get_world_size() if mesh is None else mesh.size()
    return dist_sum(x, mesh) / size


def dist_mean_dict(x: dict[str, Tensor | float]) -> dict[str, float]:
    """Average several numbers in one collective. All ranks must have the same keys."""
    keys = sorted(x)
    means = dist_mean(torch.tensor([float(x[k]) for k in keys], dtype=torch.float64))
    return dict(zip(keys, means.tolist(), strict=True))


def agree_any(flag: bool) -> bool:
    """Return on every rank whether the flag is set on any rank."""
    return bool(dist_max(float(flag)).item())


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=get_device())
    return box[0]


class RanksFailed(RuntimeError):
    """Shared work failed on at least one rank. Every rank raises it; it names the first one."""


class RankMachineFault(RanksFailed, MachineFault):
    """Shared work failed because of the machine, such as a full disk."""


def run_together(work: Callable[[], T]) -> T:
    """Run `work` on every rank. If any rank fails, all of them raise.

    A UserError stays a UserError, a fault of the machine becomes RankMachineFault, and any other
    error RanksFailed.
    """
    return run_and_average(lambda: (work(), 0.0))[0]


def run_and_average(work: Callable[[], tuple[T, float]]) -> tuple[T, float]:
    """Run `work` as `run_together` does, and average the number that it returns over all ranks.

    One small collective carries the number and whether the rank failed, for use in every step.
    """
    done, error = _attempt(work)
    result, number = (None, 0.0) if done is None else done
    numbers = torch.tensor([float(error is not None), number], dtype=torch.float64)
    failed, mean = dist_mean(numbers).tolist()
    if failed:
        _raise_first(gather_objects(_describe(error)), error)
    return cast(T, result), mean


def run_on_rank_0(work: Callable[[], T]) -> T:
    """Run `work` on rank 0. Every rank returns its result, or raises as in `run_together`."""
    is_rank_0 = not dist.is_initialized() or dist.get_rank() == 0
    result, error = _attempt(work) if is_rank_0 else (None, None)
    result, failure = broadcast_object((result, _describe(error)))
    _raise_first([failure], error)
    return result


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


Failure = tuple[type[Exception], str]  # what all ranks raise


def _describe(error: Exception | None) -> Failure | None:
    if error is None:
        return None
    if isinstance(error, UserError):
        return UserError, str(error)
    if isinstance(error, MachineFault):
        return RankMachineFault, str(error)
    fault = find_disk_fault(error)
    if fault is not None:
        return RankMachineFault, fault
    return RanksFailed, f"{type(error).__name__}: {error}"


def _raise_first(failures: list[Failure | None], own: Exception | None) -> None:
    for rank, failure in enumerate(failures):
        if failure is not None:
            kind, message = failure
            if kind is not UserError and dist.is_initialized() and dist.get_world_size() > 1:
                message = f"rank {rank}: {message}"
            raise kind(message) from own
