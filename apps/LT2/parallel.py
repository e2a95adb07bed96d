"""How a looped model is spread over devices: the plan that lingua.distributed carries out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.args import UserError
from lingua.distributed import DistributedArgs


def build_fsdp_grouping_plan(args: LoopedTransformerArgs) -> list[tuple[str, bool]]:
    """Units of sharding, (module path, free the gathered weights after its forward).

    A layer runs `loop_count` times, so it stays gathered from its first run to its backward;
    freeing it would gather it again in each loop.
    """
    return [(f"layers.{i}", False) for i in range(args.n_layers)]


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


def set_activation_checkpointing(model: LoopedTransformer, mode: str) -> None:
    """The part of distributed.activation_checkpointing that only the model can do: whole loops."""
    model.checkpoint_loops = mode == "loop"
