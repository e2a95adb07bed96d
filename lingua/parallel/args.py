"""Options of `distributed:`, and the dtypes of training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lingua.errors import UserError

FSDP_TYPES = ("no_shard", "full_shard")


SPAWN_METHODS = ("forkserver", "spawn", "fork")


MAX_TIMEOUT = 1_000_000  # minutes: two years; the clock of a collective overflows far above


FLOAT8_FILTER = r"layers\.[0-9]+\."


@dataclass
class DistributedArgs:
    # ranks over which weights are sharded; 1 with full_shard shards over all dp_replicate ranks
    dp_shard: int = 1
    # ranks that each see other data; filled from the number of processes where it does not fit
    dp_replicate: int = 1
    # ranks over which each matrix product is split; embedding and head, too, where it divides the
    # vocabulary
    tp_size: int = 1
    # what is recomputed in the backward pass: none; selective (all but matmuls and attention); full
    # (every block); loop (every loop of a looped model)
    activation_checkpointing: str = "none"
    selective_activation_checkpointing: bool = False  # old spelling of "selective" above
    compile: bool = False  # torch.compile every block
    fsdp_type: str = "no_shard"  # no_shard: every rank holds all weights; full_shard: each a part
    # dtype of matrices in the forward and backward pass: fp32, fp16, bf16, or auto (bf16 on CUDA,
    # fp32 on CPU); weights, gradient reduction and optimizer are fp32 at any setting
    model_dtype: str = "bf16"
    # full_shard: free a layer's gathered weights after each of its runs; saves their memory, and
    # gathers them twice for every loop and micro-batch where once a step would do
    reshard_between_loops: bool = False
    float8_recipe: str | None = None  # not implemented: null only
    float8_filter: str = FLOAT8_FILTER  # not implemented: the default only
    matmul_allow_tf32: bool = False  # fp32 matmuls on CUDA use TF32: faster, 10 bits of mantissa
    allow_bf16_reduced_precision_reduction: bool = True  # bf16 matmuls on CUDA may sum in bf16
    detect_anomaly: bool = False  # trace NaN in the backward pass to its operation; slow
    compile_cache_size_limit: int = 8  # versions of each kind of block that may be compiled
    spawn_method: str = "forkserver"  # how data loader processes start: forkserver, spawn, fork
    timeout_minutes: float = 30.0  # a collective that waits for longer ends the run

    def __post_init__(self):
        _one_of("fsdp_type", self.fsdp_type, FSDP_TYPES)
        _one_of("model_dtype", self.model_dtype, (*DTYPES, "auto"))
        _one_of("spawn_method", self.spawn_method, SPAWN_METHODS)
        _one_of("activation_checkpointing", self.activation_checkpointing, ACTIVATION_CHECKPOINTING)
        for name in ("dp_shard", "dp_replicate", "tp_size", "compile_cache_size_limit"):
            if getattr(self, name) < 1:
                raise UserError(f"distributed.{name}={getattr(self, name)}: must be 1 or more")
        if not 0 < self.timeout_minutes <= MAX_TIMEOUT:
            raise UserError(
                f"distributed.timeout_minutes={self.timeout_minutes}: must be above 0 and at most "
                f"{MAX_TIMEOUT}"
            )
        if self.float8_recipe is not None or self.float8_filter != FLOAT8_FILTER:
            raise UserError(
                "distributed.float8_recipe, distributed.float8_filter: float8 is not implemented; "
                "leave both out"
            )
        limit = DistributedArgs.compile_cache_size_limit
        if self.compile_cache_size_limit != limit and not self.compile:
            raise UserError(
                f"distributed.compile_cache_size_limit={self.compile_cache_size_limit} with "
                f"distributed.compile=false: nothing is compiled; leave it at {limit}"
            )
        if self.reshard_between_loops and self.fsdp_type != "full_shard":
            raise UserError(
                f"distributed.reshard_between_loops=true with distributed.fsdp_type="
                f"{self.fsdp_type}: nothing is sharded; use full_shard, or leave it out"
            )
        if self.selective_activation_checkpointing:
            if self.activation_checkpointing not in ("none", "selective"):
                raise UserError(
                    "distributed.selective_activation_checkpointing=true contradicts "
                    f"distributed.activation_checkpointing={self.activation_checkpointing}: "
                    "set only the latter"
                )
            self.activation_checkpointing = "selective"


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"distributed.{name}={value}: must be one of {', '.join(choices)}")


ACTIVATION_CHECKPOINTING = ("none", "selective", "full", "loop")


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_dtype(model_dtype: str, device_type: str) -> torch.dtype:
    if model_dtype == "auto":
        model_dtype = "bf16" if device_type == "cuda" else "fp32"
    return DTYPES[model_dtype]


def needs_fsdp(args: DistributedArgs, world_size: int, device_type: str) -> bool:
    """FSDP joins several ranks, and in a single process it casts matrices to the compute dtype."""
    return world_size > 1 or resolve_dtype(args.model_dtype, device_type) is not torch.float32
