"""Find this process's rank and device, and set its environment variables.

Ranks come from torchrun (LOCAL_RANK, RANK, WORLD_SIZE) or srun (SLURM_*); otherwise this is a
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


def get_is_torch_run() -> bool:
    return "LOCAL_RANK" in os.environ


def get_is_slurm_job() -> bool:
    """Whether srun started this process. torchrun inside a SLURM job does not count."""
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
    """Return the number of this job's processes on this machine."""
    if get_is_slurm_job():
        return get_world_size() // int(os.environ["SLURM_NNODES"])  # nodes have equal shares
    return int(os.environ["LOCAL_WORLD_SIZE"]) if get_is_torch_run() else 1


def get_is_master() -> bool:
    return get_global_rank() == 0


def get_master_port(job_id: int) -> int:
    """Return the same port on all ranks of a SLURM job, without communication."""
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
    """Return this rank's GPU, or the CPU on a machine without GPUs."""
    import torch  # slow; data workers and launchers import this module without torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = get_local_rank(), torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine has {count}; use "
            f"torchrun --nproc-per-node {count} or fewer"
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
