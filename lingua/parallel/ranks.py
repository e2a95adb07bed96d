"""Find this process's rank and device, and set its environment variables.

Ranks come from torchrun (LOCAL_RANK, RANK, WORLD_SIZE) or srun (SLURM_*); otherwise this is a
single process. Nothing here needs a process group.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from lingua.errors import UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass
class EnvironmentArgs:
    """Environment variables of this process and its children.

    A variable that is already set keeps its value. null sets nothing.
    """

    MKL_SERVICE_FORCE_INTEL: str | None = "GNU"  # any value: Intel threading in MKL on all CPUs
    OMP_NUM_THREADS: str | None = "1"  # threads of child processes, such as data workers
    MKL_NUM_THREADS: str | None = "1"  # the same for MKL
    # "1": faster all-reduce of small tensors inside a node. torch 2.11 fails with it on several
    # GPUs ("Could not resolve the process group", pytorch/pytorch#180663; fixed in 2.12).
    ENABLE_INTRA_NODE_COMM: str | None = None
    # "1": collectives hold less memory; the default since torch 2.11, which warns if it is set
    TORCH_NCCL_AVOID_RECORD_STREAMS: str | None = None
    NCCL_IB_TIMEOUT: str | None = "22"  # InfiniBand timeout, 4.096 us * 2 ** value
    NCCL_DEBUG: str | None = "WARN"  # INFO prints the topology at start
    TORCH_NCCL_ASYNC_ERROR_HANDLING: str | None = "1"  # a failed collective ends the process


def setup_env(env_args: EnvironmentArgs) -> None:
    for field in fields(env_args):
        value = getattr(env_args, field.name)
        if value is None:
            continue
        kept = os.environ.setdefault(field.name, value)
        if kept != value:
            logger.info(f"env.{field.name}={value} is not used: the environment has {kept}")


# ---- ranks


@dataclass(frozen=True)
class Launch:
    """The place of this process among the processes of its job."""

    rank: int
    local_rank: int
    world_size: int
    names: tuple[str, ...]  # the variables that these numbers come from
    alone: str  # what to do to run a single process

    @property
    def source(self) -> str:
        return " ".join(f"{name}={os.environ[name]}" for name in self.names)


def get_is_torch_run() -> bool:
    return "LOCAL_RANK" in os.environ


def get_is_slurm_job() -> bool:
    """Whether srun started this process. torchrun inside a SLURM job does not count."""
    return not get_is_torch_run() and {"SLURM_JOB_ID", "SLURM_PROCID"} <= os.environ.keys()


def find_launch() -> Launch:
    """Read the ranks from the environment. UserError for ranks that cannot exist."""
    if get_is_torch_run():
        if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
            raise UserError(
                f"LOCAL_RANK={os.environ['LOCAL_RANK']} is set without RANK and WORLD_SIZE: unset "
                "LOCAL_RANK to run one process, or set RANK and WORLD_SIZE (torchrun sets all)"
            )
        return _check_launch("RANK", "LOCAL_RANK", ("WORLD_SIZE",), alone="unset LOCAL_RANK")
    if get_is_slurm_job():
        total: tuple[str, ...] = ("SLURM_NTASKS",)
        if not os.environ.get("SLURM_NTASKS") and os.environ.get("SLURM_NNODES"):
            # sbatch sets SLURM_NTASKS only with --ntasks; the default is one task per node
            total = ("SLURM_NNODES",)
            total += ("SLURM_NTASKS_PER_NODE",) * bool(os.environ.get("SLURM_NTASKS_PER_NODE"))
        return _check_launch("SLURM_PROCID", "SLURM_LOCALID", total, alone="unset SLURM_PROCID")
    if os.environ.get("RANK") and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"RANK={os.environ['RANK']} WORLD_SIZE={os.environ['WORLD_SIZE']} are set without "
            "LOCAL_RANK: set it too, start with torchrun, or unset both to run one process"
        )
    return Launch(0, 0, 1, (), "")


def _check_launch(rank: str, local_rank: str, total: tuple[str, ...], *, alone: str) -> Launch:
    """Read the variables of these names. `total` are factors of the number of processes."""
    world_size = math.prod(read_number(name, at_least=1) for name in total)
    source = " ".join(f"{name}={os.environ[name]}" for name in total)
    place = read_number(rank)
    if place >= world_size:
        raise UserError(
            f"{rank}={place} must be from 0 to {world_size - 1}, because {source}; correct one of "
            f"them, or {alone} to run one process"
        )
    return Launch(place, read_number(local_rank), world_size, (rank, *total), alone)


def read_number(name: str, *, at_least: int = 0, at_most: int | None = None) -> int:
    """Read an environment variable. UserError unless it is a number in this range."""
    text = os.environ.get(name)
    with contextlib.suppress(ValueError):
        value = int(text or "")
        if at_least <= value and (at_most is None or value <= at_most):
            return value
    limit = f"at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    if text is None:
        raise UserError(f"{name} is not set; set it to a number, {limit}")
    raise UserError(f"{name}={text} must be a number, {limit}")


def launcher(python: str) -> list[str]:
    """Return the start of a command that starts as many processes as this job has."""
    n = get_world_size()
    if n > 1 and get_is_slurm_job():
        return ["srun", "--ntasks", str(n), python]
    if n == 1 or not os.environ.get("LOCAL_WORLD_SIZE"):
        return [python]
    n_here = get_local_world_size()
    nodes = ["--nnodes", str(n // n_here)] if n > n_here else []
    return ["torchrun", *nodes, "--nproc-per-node", str(n_here)]


def get_global_rank() -> int:
    return find_launch().rank


def get_local_rank() -> int:
    return find_launch().local_rank


def get_world_size() -> int:
    return find_launch().world_size


def get_local_world_size() -> int:
    """Return the number of this job's processes on this machine."""
    if get_is_slurm_job():
        return get_world_size() // read_number("SLURM_NNODES", at_least=1)  # equal shares
    return read_number("LOCAL_WORLD_SIZE", at_least=1) if get_is_torch_run() else 1


def get_is_master() -> bool:
    return get_global_rank() == 0


def get_master_port(job_id: int) -> int:
    """Return the same port on all ranks of a SLURM job, without communication."""
    if "MASTER_PORT" in os.environ:
        return read_number("MASTER_PORT", at_least=1, at_most=2**16 - 1)
    return random.Random(job_id).randint(20_000, 60_000)


def get_master_addr() -> str:
    """Return the host of rank 0."""
    if os.environ.get("MASTER_ADDR"):
        return os.environ["MASTER_ADDR"]
    if not get_is_slurm_job():
        return "127.0.0.1"
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        names = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True)
        return names.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"MASTER_ADDR is not set, and scontrol does not name the host of rank 0 "
            f"(SLURM_JOB_NODELIST={nodes}; {error}); set MASTER_ADDR to that host"
        ) from None


def get_device() -> torch.device:
    """Return this rank's GPU, or the CPU on a machine without GPUs."""
    import torch  # slow; data workers and launchers import this module without torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = get_local_rank(), torch.cuda.device_count()
    if local_rank >= count:
        name = "SLURM_LOCALID" if get_is_slurm_job() else "LOCAL_RANK"
        option = "srun --ntasks-per-node" if get_is_slurm_job() else "torchrun --nproc-per-node"
        raise UserError(
            f"{name}={local_rank} has no GPU: this process sees {count}; use {option} {count} or "
            "fewer"
        )
    return torch.device("cuda", local_rank)


# ---- submitting a job from inside a job

# Variables that belong to this job. A job submitted from inside must not inherit them.
JOB_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "WANDB_", "TORCHELASTIC_")
JOB_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOB_NAMES += ("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME")
USER_NAMES = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY")  # of the user, not of the run


@contextlib.contextmanager
def clean_env() -> Iterator[None]:
    """Hide this job's variables while another job is submitted."""
    hidden = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(JOB_PREFIXES) or name in JOB_NAMES) and name not in USER_NAMES
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
