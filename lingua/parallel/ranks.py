"""Where this process runs: its rank, its device, its environment, and the signals it gets.

Ranks come from torchrun (LOCAL_RANK, RANK, WORLD_SIZE), from srun (SLURM_*), or are those of a
single process. Nothing here needs a process group.
"""

from __future__ import annotations

import contextlib
import logging
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
    """Environment variables for this process and those it starts.

    A variable that is set already keeps its value; null leaves it alone.
    """

    MKL_SERVICE_FORCE_INTEL: str | None = "GNU"  # any value: MKL's Intel threading on all CPUs
    OMP_NUM_THREADS: str | None = "1"  # threads of processes started later (data loaders)
    MKL_NUM_THREADS: str | None = "1"  # the same for MKL
    # "1": faster all-reduce of small tensors inside a node. torch 2.11 ends every run of several
    # GPUs with it ("Could not resolve the process group"; mended in 2.12, pytorch/pytorch#180663).
    ENABLE_INTRA_NODE_COMM: str | None = None
    # "1": less memory held by collectives; from torch 2.11 on always so, with a warning where set
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
            logger.info(f"env.{field.name}={value} not used: the environment has {kept}")


# ---- ranks


def get_is_torch_run() -> bool:
    return "LOCAL_RANK" in os.environ


def get_is_slurm_job() -> bool:
    """Whether srun started this process (torchrun inside a SLURM job does not count)."""
    return not get_is_torch_run() and {"SLURM_JOB_ID", "SLURM_PROCID"} <= os.environ.keys()


def _rank_variable(torchrun: str, slurm: str, alone: int) -> int:
    if get_is_torch_run():
        return int(os.environ[torchrun])
    return int(os.environ[slurm]) if get_is_slurm_job() else alone


def get_global_rank() -> int:
    return _rank_variable("RANK", "SLURM_PROCID", 0)


def get_local_rank() -> int:
    return _rank_variable("LOCAL_RANK", "SLURM_LOCALID", 0)


def get_world_size() -> int:
    return _rank_variable("WORLD_SIZE", "SLURM_NTASKS", 1)


def get_local_world_size() -> int:
    """Processes of this job on this machine; SLURM, asked for equal shares, does not count them."""
    if get_is_slurm_job():
        return get_world_size() // int(os.environ["SLURM_NNODES"])
    return int(os.environ["LOCAL_WORLD_SIZE"]) if get_is_torch_run() else 1


def get_is_master() -> bool:
    return get_global_rank() == 0


def get_master_port(job_id: int) -> int:
    """The port that all ranks of a SLURM job agree on without talking to each other."""
    if "MASTER_PORT" in os.environ:
        return int(os.environ["MASTER_PORT"])
    return random.Random(job_id).randint(20_000, 60_000)


def get_master_addr() -> str:
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    if get_is_slurm_job():
        nodes = os.environ["SLURM_JOB_NODELIST"]
        names = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True)
        return names.split()[0]
    return "127.0.0.1"


def get_device() -> torch.device:
    """This rank's GPU, or the CPU on a machine without any."""
    import torch  # takes seconds, and who only asks for ranks does without

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = get_local_rank(), torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU, this machine shows {count}: "
            f"start at most {count} processes a node (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", local_rank)


# ---- preemption


# What tells a process that it is part of this job: a job submitted from inside must not inherit it.
JOB_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "WANDB_", "TORCHELASTIC_")
JOB_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
)
USER_NAMES = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY")  # who the user is, not which run


@contextlib.contextmanager
def clean_env() -> Iterator[None]:
    """Hide this job's variables, to submit another job from inside it."""
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
