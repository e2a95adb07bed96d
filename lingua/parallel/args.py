"""Options of `distributed:`, and the dtypes of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lingua.errors import UserError

FSDP_TYPES = ("no_shard", "full_shard")
SPAWN_METHODS = ("forkserver", "spawn", "fork")
ACTIVATION_CHECKPOINTING = ("none", "selective", "full", "loop")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class DistributedArgs:
    # ranks that shard the weights; 1 with full_shard shards over all dp_replicate ranks
    dp_shard: int = 1
    # data-parallel replicas; set from the number of processes if it does not fit
    dp_replicate: int = 1
    # tensor-parallel ranks: they split every matrix product, and the vocabulary if it is divisible
    tp_size: int = 1
    # what the backward recomputes: none; selective (all but matmuls and attention); full (every
    # block); loop (every loop of a looped model)
    activation_checkpointing: str = "none"
    selective_activation_checkpointing: bool = False  # Lingua's name for "selective" above
    compile: bool = False  # torch.compile every block
    # on a GPU, run forward and backward of a step as one CUDA graph: one launch, not thousands
    cuda_graph: bool = False
    fsdp_type: str = "no_shard"  # no_shard: every rank holds all weights; full_shard: FSDP2
    # dtype of matrices in forward and backward: fp32, bf16, or auto (bf16 on CUDA, fp32 on CPU);
    # master weights, gradient reduction and optimizer are always fp32
    model_dtype: str = "bf16"
    # full_shard: free a layer's gathered weights after each loop. Saves memory; without it they are
    # gathered once a step, with it twice for every loop and micro-batch
    reshard_between_loops: bool = False
    matmul_allow_tf32: bool = False  # fp32 matmuls on CUDA use TF32: faster, 10 bits of mantissa
    allow_bf16_reduced_precision_reduction: bool = True  # bf16 matmuls on CUDA may sum in bf16
    detect_anomaly: bool = False  # trace NaN in the backward to its operation; slow
    compile_cache_size_limit: int = 8  # compiled versions of each kind of block
    spawn_method: str = "forkserver"  # how data workers start: forkserver, spawn, fork
    timeout_minutes: float = 30.0  # a collective that takes longer ends the run

    def __post_init__(self):
        _one_of("fsdp_type", self.fsdp_type, FSDP_TYPES)
        _one_of("model_dtype", self.model_dtype, (*DTYPES, "auto"))
        _one_of("spawn_method", self.spawn_method, SPAWN_METHODS)
        _one_of("activation_checkpointing", self.activation_checkpointing, ACTIVATION_CHECKPOINTING)
        for name in ("dp_shard", "dp_replicate", "tp_size", "compile_cache_size_limit"):
            if getattr(self, name) < 1:
                raise UserError(f"distributed.{name}={getattr(self, name)} must be at least 1")
        if self.timeout_minutes <= 0:
            raise UserError(f"distributed.timeout_minutes={self.timeout_minutes} must be above 0")
        if self.selective_activation_checkpointing:
            if self.activation_checkpointing not in ("none", "selective"):
                raise UserError(
                    "distributed.selective_activation_checkpointing=true contradicts "
                    f"distributed.activation_checkpointing={self.activation_checkpointing}; "
                    "set only the second"
                )
            self.activation_checkpointing = "selective"


def unused_options(args: DistributedArgs) -> Iterator[str]:
    """Yield a warning for each option that is set and has no effect."""
    limit = args.compile_cache_size_limit
    if limit != DistributedArgs.compile_cache_size_limit and not args.compile:
        yield (
            f"distributed.compile_cache_size_limit={limit} has no effect without "
            "distributed.compile=true"
        )
    if args.reshard_between_loops and args.fsdp_type != "full_shard":
        yield (
            "distributed.reshard_between_loops=true has no effect with "
            f"distributed.fsdp_type={args.fsdp_type}; use full_shard"
        )


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"distributed.{name}={value} must be one of {', '.join(choices)}")


def resolve_dtype(model_dtype: str, device_type: str) -> torch.dtype:
    if model_dtype == "auto":
        model_dtype = "bf16" if device_type == "cuda" else "fp32"
    return DTYPES[model_dtype]


def needs_fsdp(args: DistributedArgs, world_size: int, device_type: str) -> bool:
    """Whether there are several ranks, or one whose matrices FSDP casts to the compute dtype."""
    return world_size > 1 or resolve_dtype(args.model_dtype, device_type) is not torch.float32
