"""Prepare a model for training: tensor parallelism, activation checkpointing, compile, FSDP.

An app describes its model with a plan, a list of (module path, reshard_after_forward). Modules of
the plan that are items of a list ("layers.3") are its blocks: the units of activation checkpointing
and compile. Everything is done in place, so parameter names never change.

FSDP shards and casts weight matrices only. All other parameters (`optim.is_matrix` is false: norms,
gates, decays, convolutions) are replicated in fp32; `gradients.sync_replicated_grads` averages
their gradients.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lingua.errors import UserError
from lingua.optim import is_matrix
from lingua.parallel import tensor_parallel
from lingua.parallel.args import DistributedArgs, needs_fsdp, resolve_dtype

logger = logging.getLogger(__name__)

GroupingPlan = list[tuple[str, bool]]
Policy = Callable[..., CheckpointPolicy]


def parallelize_model(
    model: nn.Module,
    device_mesh: DeviceMesh | None,
    model_args: Any,
    distributed_args: DistributedArgs,
    fsdp_grouping_plan: GroupingPlan | None = None,
    tp_parallelize: Callable[[nn.Module, DeviceMesh, Any, DistributedArgs], None] | None = None,
    no_recompute_ops: set[Any] | None = None,
    n_block_kinds: int = 1,
) -> nn.Module:
    """Prepare a model for training, in place, and return it.

    The model is on meta, or has the same weights on every rank. Its blocks do `n_block_kinds`
    different computations, which are compiled separately.
    """
    plan = fsdp_grouping_plan or default_fsdp_grouping_plan(
        len(list(get_module(model, "layers").children()))
    )
    if distributed_args.tp_size > 1:
        if tp_parallelize is None or device_mesh is None:
            raise UserError(
                f"distributed.tp_size={distributed_args.tp_size} must be 1: this model has no "
                "tensor-parallel plan"
            )
        tp_parallelize(model, device_mesh["tp"], model_args, distributed_args)

    blocks = [get_module(model, path) for path in block_paths(plan)]
    for block in blocks:
        apply_activation_checkpointing(
            block, distributed_args.activation_checkpointing, no_recompute_ops
        )
    if distributed_args.compile:
        compile_blocks(blocks, distributed_args.compile_cache_size_limit, n_block_kinds)
    if device_mesh is not None:
        apply_fsdp(model, device_mesh, distributed_args, plan)
    return model


def default_fsdp_grouping_plan(n_layers: int) -> GroupingPlan:
    return [(f"layers.{i}", False) for i in range(n_layers)]


def block_paths(plan: GroupingPlan) -> list[str]:
    return [path for path, _ in plan if path.rsplit(".", 1)[-1].isdigit()]


def get_module(module: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path."""
    return module.get_submodule(path)


def set_module(module: nn.Module, path: str, value: nn.Module) -> None:
    """Replace the submodule at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)


# ---- activation checkpointing


def apply_activation_checkpointing(
    block: nn.Module, mode: str, no_recompute_ops: set[Any] | None = None
) -> None:
    """Recompute a block in its backward. Does nothing for "loop", which the app implements."""
    if mode in ("none", "loop"):
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = _selective_contexts(frozenset(no_recompute_ops or ()))
        # torch warns for each compiled block that it must not mutate in place; blocks do not.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    block.forward = partial(checkpoint, block.forward, **options)


@cache  # blocks with different objects would compile separately
def _selective_contexts(no_recompute_ops: frozenset[Any]) -> Callable:
    policy = get_default_policy({*no_recompute_ops})
    contexts: Any = partial(create_selective_checkpoint_contexts, policy)
    contexts.cache_hash = policy.hash
    return contexts


class SelectivePolicy:
    """Save the results of the operators in `keep`; recompute all others.

    A hash stands for it in the key of torch's cache of traced blocks. Without one, torch traces
    every kind of block again at each start.
    """

    def __init__(self, keep: set[Any]):
        self.keep, self.hash = keep, str(sorted(map(str, keep)))

    def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in self.keep else CheckpointPolicy.PREFER_RECOMPUTE

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.hash,)


def get_default_policy(no_recompute_ops: set[Any] | None = None) -> SelectivePolicy:
    """Save the results of matmuls, attention and `no_recompute_ops`; recompute all others."""
    return SelectivePolicy(default_no_recompute_ops() | (no_recompute_ops or set()))


def default_no_recompute_ops() -> set[Any]:
    aten = torch.ops.aten
    return {
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
        *tensor_parallel.collectives(),
    }


# ---- compile


@cache
def operator_code_hash() -> str:
    """Hash the source of the imported modules that define operators, or what blocks recompute.

    torch's key of a traced block names our operators, but not their backward formulas and shapes.
    """
    digest = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and (name.startswith("lingua.parallel.") or re.match(r"apps\.\w+\.kernel\b", name)):
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def compile_blocks(blocks: list[nn.Module], limit_of_kind: int, n_kinds: int) -> None:
    """Compile the forward of every block, in place; blocks with the same computation share code.

    Sizes and numbers are constants in compiled code. Mark a size that varies with
    torch._dynamo.maybe_mark_dynamic. A call that needs more than `limit_of_kind * n_kinds` versions
    raises UserError; torch would fall back to eager mode with only a warning.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch._inductor import config as inductor_config
    from torch.compiler import config as compiler_config

    config = torch._dynamo.config
    config.recompile_limit = limit_of_kind * n_kinds
    # torch also limits the sum over all functions.
    config.accumulated_recompile_limit = max(
        config.accumulated_recompile_limit, config.recompile_limit
    )
    config.fail_on_recompile_limit_hit = True
    # Operators take tensors without gaps, so padded strides would cost copies.
    inductor_config.comprehensive_padding = False
    if not compiler_config.cache_key_tag.endswith(operator_code_hash()):
        compiler_config.cache_key_tag += operator_code_hash()

    def compiled(block: nn.Module) -> Callable:
        # With dynamic shapes, a second window size would become a variable of every kernel.
        fast = torch.compile(block.forward, dynamic=False)
        split_linears = tensor_parallel.find_split_linears(block)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor_parallel.hold_shards(split_linears)
            try:
                return fast(*args, **kwargs)
            except FailOnRecompileLimitHit:
                raise UserError(
                    f"distributed.compile_cache_size_limit={limit_of_kind} for each kind of block "
                    f"({n_kinds} here) is too low; raise it, or use distributed.compile=false. "
                    "TORCH_LOGS=recompiles logs why torch recompiles"
                ) from None

        return call

    for block in blocks:
        # Only the forward, so that FSDP's hooks stay outside the compiled code.
        block.forward = compiled(block)


# ---- FSDP


def apply_fsdp(
    model: nn.Module, device_mesh: DeviceMesh, args: DistributedArgs, plan: GroupingPlan
) -> None:
    """Shard weight matrices: each module of the plan is one unit, the root takes the others."""
    if not needs_fsdp(args, dist.get_world_size(), device_mesh.device_type):
        return
    options: dict[str, Any] = {
        "mesh": fsdp_mesh(device_mesh, args),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=resolve_dtype(args.model_dtype, device_mesh.device_type),
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # inputs such as rotary angles must stay fp32
        ),
        "ignored_params": {p for name, p in model.named_parameters() if not is_matrix(name, p)},
    }
    for path, reshard in plan:
        fully_shard(get_module(model, path), reshard_after_forward=reshard, **options)
    # The backward starts with the root, so freeing it would gather it again at once.
    fully_shard(model, reshard_after_forward=False, **options)


def fsdp_mesh(device_mesh: DeviceMesh, args: DistributedArgs) -> DeviceMesh:
    """Return a 1-D mesh to shard over, or a 2-D mesh to replicate and shard over."""
    if args.fsdp_type == "full_shard" and args.dp_shard == 1:
        return device_mesh["dp_replicate"]
    if args.fsdp_type == "full_shard" and args.dp_replicate == 1:
        return device_mesh["dp_shard"]
    return device_mesh["dp_replicate", "dp_shard"]


# ---- checks


@torch.no_grad()
def check_model_value_range(
    model: nn.Module, range: float = 1e3, std: float = 1e3, zero_init: Iterable[str] = ()
) -> list[str]:
    """Log and return warnings about tensors that were probably never initialized or loaded.

    Checks this rank's shard of each parameter and buffer for NaN, infinity, magnitudes above
    `range`, a std above `std`, and all zeros. Names that end with one of `zero_init` may be zero.
    """
    problems = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local = tensor_parallel.local_tensor(tensor)
        if local.numel() == 0 or not local.is_floating_point():
            continue
        if not local.isfinite().all():
            problems.append(f"{name} has NaN or infinite values")
        elif local.abs().max() > range:
            problems.append(f"{name} has values up to {local.abs().max():.3g}, above {range:g}")
        elif local.numel() > 1 and local.float().std() > std:
            problems.append(f"{name} has a std of {local.float().std():.3g}, above {std:g}")
        elif not local.any() and not name.endswith(tuple(zero_init)):
            problems.append(f"{name} is all zeros")
    for problem in problems:
        logger.warning(f"suspicious values: {problem}")
    return problems


@torch.no_grad()
def first_nonfinite(model: nn.Module) -> str | None:
    """Return the first parameter or gradient with a NaN or infinite value on this rank."""
    for name, param in model.named_parameters():
        for label, tensor in ((name, param), (f"{name}.grad", param.grad)):
            if tensor is None:
                continue
            local = tensor_parallel.local_tensor(tensor)
            if not local.isfinite().all():
                return label
    return None
