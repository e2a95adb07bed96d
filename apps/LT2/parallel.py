"""How a looped model is spread over devices: the plan that lingua.distributed carries out."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua import gradients
from lingua.args import UserError
from lingua.distributed import DistributedArgs


def build_fsdp_grouping_plan(
    args: LoopedTransformerArgs, *, reshard_between_loops: bool = False
) -> list[tuple[str, bool]]:
    """Units of sharding, (module path, free the gathered weights after its forward).

    A layer runs `loop_count` times, so it stays gathered from its first run to its backward;
    freeing it would gather it again in each loop.
    """
    return [(f"layers.{i}", reshard_between_loops) for i in range(args.n_layers)]


def set_gradient_sync(model: LoopedTransformer, is_last: bool) -> None:
    """Call it before each micro-batch; `is_last`: the optimizer step comes after this one.

    A looped layer passes its backward once a loop, and FSDP would free its weights and gather them
    anew each time. Here the layer stays as it is until the backward enters loop 0, its last pass;
    then its gradient, by now the sum over loops and micro-batches, is reduced, and its weights are
    freed if this was the last micro-batch.
    """
    free = model.reshard_between_loops
    finish = partial(gradients.set_gradient_sync, model, is_last, reshard=is_last or free)
    if model.args.loop_count == 1:
        finish()
    else:
        gradients.set_gradient_sync(model, False, reshard=free)
        model.before_last_backward = finish


def get_no_recompute_ops() -> set[Any]:
    """What selective activation checkpointing keeps beside lingua's operators: mixer kernels."""
    lt2 = torch.ops.lt2  # registered by the import of the mixers, with the model
    return {
        lt2.gated_delta_rule.default,
        lt2.kda.default,
        lt2.delta_rule.default,
        lt2.simple_gla.default,
        lt2.gla.default,
        lt2.nsa_compressed.default,
        lt2.nsa_choose.default,
        lt2.nsa_selected.default,
        lt2.dsa.default,
        torch.ops.torch_attn._varlen_attn.default,
    }


def count_block_kinds(model: LoopedTransformer) -> int:
    """Different computations of a block, over all loops: (mixer, window) pairs."""
    return len({spec for loop in model.layout for spec in loop})


def tp_parallelize(
    model: nn.Module, tp_mesh: DeviceMesh, args: LoopedTransformerArgs, dist_args: DistributedArgs
) -> None:
    """Split every layer's heads and feed-forward over `tp_mesh`."""
    raise UserError(
        f"distributed.tp_size={dist_args.tp_size}: looped models are not split by tensor "
        "parallelism yet; use tp_size=1, with distributed.fsdp_type=full_shard for memory"
    )


def set_resharding(model: LoopedTransformer, between_loops: bool) -> None:
    """The part of distributed.reshard_between_loops that `set_gradient_sync` has to know."""
    model.reshard_between_loops = between_loops


def set_activation_checkpointing(model: LoopedTransformer, mode: str) -> None:
    """The part of distributed.activation_checkpointing that only the model can do: whole loops."""
    model.checkpoint_loops = mode == "loop"
