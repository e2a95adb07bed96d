"""Many processes as one: the process group, the device mesh, and values agreed across ranks.

The same code runs on CUDA (nccl), on CPU (gloo), and in a single process without any group. What
is done to the model is in `parallelize.py`, ranks and signals are in `launch.py`; both are
importable from here.

Mesh dimensions: `dp_replicate` always; `dp_shard` where it is above 1 or nothing is sharded; `tp`
where it is above 1. As in Lingua, `fsdp_type: full_shard` with `dp_shard: 1` shards the weights
over all of `dp_replicate`; with `dp_shard` above 1 they are sharded over `dp_shard` ranks and
replicated over the rest (HSDP).
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lingua.errors import MachineFault, UserError, is_machine_fault
from lingua.parallel.args import DistributedArgs, needs_fsdp
from lingua.parallel.gradients import clip_grad_norm_ as clip_grad_norm_
from lingua.parallel.gradients import set_gradient_sync as set_gradient_sync
from lingua.parallel.gradients import sync_replicated_grads as sync_replicated_grads
from lingua.parallel.parallelize import check_model_value_range as check_model_value_range
from lingua.parallel.parallelize import default_fsdp_grouping_plan as default_fsdp_grouping_plan
from lingua.parallel.parallelize import first_nonfinite as first_nonfinite
from lingua.parallel.parallelize import get_default_policy as get_default_policy
from lingua.parallel.parallelize import get_module as get_module
from lingua.parallel.parallelize import parallelize_model as parallelize_model
from lingua.parallel.parallelize import set_module as set_module
from lingua.parallel.ranks import EnvironmentArgs as EnvironmentArgs
from lingua.parallel.ranks import clean_env as clean_env
from lingua.parallel.ranks import get_device as get_device
from lingua.parallel.ranks import get_global_rank as get_global_rank
from lingua.parallel.ranks import get_is_master as get_is_master
from lingua.parallel.ranks import get_is_slurm_job as get_is_slurm_job
from lingua.parallel.ranks import get_is_torch_run as get_is_torch_run
from lingua.parallel.ranks import get_local_rank as get_local_rank
from lingua.parallel.ranks import get_master_addr as get_master_addr
from lingua.parallel.ranks import get_master_port as get_master_port
from lingua.parallel.ranks import get_world_size as get_world_size
from lingua.parallel.ranks import setup_env as setup_env
from lingua.parallel.signals import blocked_parent_signals
from lingua.parallel.signals import init_signal_handler as init_signal_handler
from lingua.parallel.signals import requeue_slurm_job as requeue_slurm_job
from lingua.parallel.torchrun import exit_with_torchrun, signal_when_torchrun_dies

logger = logging.getLogger(__name__)
T = TypeVar("T")


def fit_to_world(args: DistributedArgs, world_size: int) -> DistributedArgs:
    """The same settings with `dp_replicate` such that the mesh covers all processes."""
    if args.fsdp_type == "no_shard" and args.dp_shard > 1:
        raise UserError(
            f"distributed.dp_shard={args.dp_shard} with distributed.fsdp_type=no_shard: "
            "use fsdp_type=full_shard, or dp_shard=1"
        )
    rest = args.dp_shard * args.tp_size
    if world_size % rest:
        options = {"dp_shard": args.dp_shard, "tp_size": args.tp_size}
        asked = " times ".join(f"distributed.{k}={n}" for k, n in options.items() if n > 1)
        raise UserError(
            f"{asked} needs a multiple of {rest} processes, not {world_size}: start them, on one "
            f"machine with torchrun --nproc-per-node {rest * max(world_size // rest, 1)}"
        )
    if args.dp_replicate * rest != world_size:
        logger.info(f"distributed.dp_replicate: {args.dp_replicate} -> {world_size // rest}")
    return replace(args, dp_replicate=world_size // rest)


def setup_torch_distributed(args: DistributedArgs) -> None:
    """Set torch's switches and join the process group, if there is any use for one."""
    signal_when_torchrun_dies()
    multiprocessing.set_start_method(args.spawn_method, force=True)
    if args.spawn_method == "forkserver":
        # Started now, the server is a copy of a process without CUDA and threads.
        try:
            with blocked_parent_signals():
                multiprocessing.forkserver.ensure_running()
        except OSError as error:
            if error.errno is not None:
                raise
            # "AF_UNIX path too long": the name of a socket has 107 characters at most
            raise UserError(
                f"TMPDIR={tempfile.gettempdir()}: {error}; set a shorter one, or "
                "distributed.spawn_method=spawn"
            ) from None

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


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    common: dict[str, Any] = {"backend": "gloo", "timeout": timeout}
    if device.type == "cuda":
        common |= {"backend": "nccl", "device_id": device}
    rank, world_size = get_global_rank(), get_world_size()
    if get_is_torch_run():
        dist.init_process_group(init_method="env://", **common)
    elif world_size == 1:
        # A group of one meets in its own memory: no port, so no clash with another job.
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **common)
    else:
        address = f"tcp://{get_master_addr()}:{get_master_port(int(os.environ['SLURM_JOB_ID']))}"
        dist.init_process_group(init_method=address, rank=rank, world_size=world_size, **common)
    logger.info(f"process group: {common['backend']}, rank {rank} of {world_size} on {device}")


def destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- the mesh


def get_device_mesh(args: DistributedArgs) -> DeviceMesh | None:
    """The mesh of all ranks; None in a single process that has no group."""
    if not dist.is_initialized():
        return None
    dims = {"dp_replicate": args.dp_replicate}
    if args.dp_shard > 1 or args.fsdp_type == "no_shard":
        dims["dp_shard"] = args.dp_shard
    if args.tp_size > 1:
        dims["tp"] = args.tp_size
    sizes = tuple(dims.values())
    world_size = dist.get_world_size()
    if args.dp_replicate * args.dp_shard * args.tp_size != world_size:
        raise UserError(
            f"distributed: dp_replicate={args.dp_replicate} x dp_shard={args.dp_shard} x "
            f"tp_size={args.tp_size} must be the number of processes, {world_size}"
        )
    return init_device_mesh(get_device().type, sizes, mesh_dim_names=tuple(dims))


def get_dp_rank_and_degree(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Which part of the data this rank reads, of how many; tensor-parallel ranks share one."""
    rank, degree = 0, 1
    if mesh is not None:
        for dim in ("dp_replicate", "dp_shard"):
            if dim in (mesh.mesh_dim_names or ()):
                size = mesh[dim].size()
                rank, degree = rank * size + mesh.get_local_rank(dim), degree * size
    return rank, degree


# ---- values across ranks; all work without a process group


def _reduce(x: Tensor | float, op: dist.ReduceOp.RedOpType, mesh: DeviceMesh | None) -> Tensor:
    out = torch.as_tensor(x, device=get_device()).detach().clone()
    if out.dtype is torch.float32 or not out.is_floating_point():
        out = out.double()  # counts of tokens are exact, a mean adds no rounding of its own
    if not dist.is_initialized():
        return out
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
    """Means over ranks of several numbers, in one collective; keys must be alike on all ranks."""
    keys = sorted(x)
    means = dist_mean(torch.tensor([float(x[k]) for k in keys], dtype=torch.float64))
    return dict(zip(keys, means.tolist(), strict=True))


def agree_any(flag: bool) -> bool:
    """Whether the flag is set on any rank; the same answer on all. A collective."""
    return bool(dist_max(float(flag)).item())


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on all ranks. A collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on all ranks. A collective."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=get_device())
    return box[0]


class RanksFailed(RuntimeError):
    """Work shared by all ranks failed on at least one; raised on every rank, naming the first."""


class RankMachineFault(RanksFailed, MachineFault):
    """The same, where what failed was the machine."""


def run_together(work: Callable[[], T]) -> T:
    """Do this rank's part of a shared piece of work; if any rank fails, all of them raise.

    A UserError stays one, a full disk becomes RankMachineFault, everything else RanksFailed. A
    collective.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if agree_any(error is not None):  # one number: this may be done at every step
        _raise_first(gather_objects(None if error is None else _describe(error)), error)
    return cast(T, result)


def run_on_rank_0(work: Callable[[], T]) -> T:
    """Let rank 0 do or decide something; its result, or its failure, is that of every rank."""
    result, error = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = work()
        except Exception as caught:
            error = caught
    result, outcome = broadcast_object((result, None if error is None else _describe(error)))
    _raise_first([outcome], error)
    return result


def _describe(error: Exception) -> tuple[type[Exception], str]:
    """What to raise for it on all ranks."""
    if isinstance(error, UserError):
        return UserError, str(error)
    kind = RankMachineFault if is_machine_fault(error) else RanksFailed
    return kind, f"{type(error).__name__}: {error}"


def _raise_first(outcomes: list[tuple[type[Exception], str] | None], own: Exception | None) -> None:
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            kind, message = outcome
            raise kind(message if kind is UserError else f"rank {rank}: {message}") from own
