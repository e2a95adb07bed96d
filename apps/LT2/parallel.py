"""How a looped model is spread over devices: the plan that lingua.distributed carries out."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from apps.LT2.mixers import Mixer
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.errors import UserError
from lingua.logger import log_on_rank_0
from lingua.parallel import gradients
from lingua.parallel.args import DistributedArgs
from lingua.parallel.tensor_parallel import (
    OUTPUTS,
    SplitEmbedding,
    SplitLinear,
    TensorParallel,
    check_divides,
    split_linears,
)
from lingua.transformer import FeedForward


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


def check_tensor_parallel(model: nn.Module, tp_size: int) -> None:
    """UserError where `tp_size` ranks cannot share the heads and channels of every layer."""
    if tp_size == 1:
        return
    for name, module in model.named_modules():
        if isinstance(module, Mixer):
            counts = module.split_counts()
            if counts is None:
                raise UserError(
                    f"distributed.tp_size={tp_size}: {module.module_name} ({name}) does not split "
                    "by heads; use 1, with distributed.fsdp_type=full_shard for memory"
                )
            for what, count in counts.items():
                check_divides(tp_size, count, f"{what} of {module.module_name}")
        elif isinstance(module, FeedForward):
            check_divides(tp_size, module.hidden_dim, "the feed-forward width (model.multiple_of)")


def tp_parallelize(
    model: nn.Module,
    tp_mesh: DeviceMesh,
    args: LoopedTransformerArgs,
    dist_args: DistributedArgs,
) -> None:
    """Share every layer's heads and feed-forward channels out over `tp_mesh`, in place, and the
    pieces of the vocabulary.

    Where its ranks do not divide the vocabulary, embedding and head stay whole on each of them.
    """
    check_tensor_parallel(model, tp_mesh.size())
    tp = TensorParallel(tp_mesh)
    if args.vocab_size % tp.size == 0:
        split_vocabulary(model, tp)
    else:
        log_on_rank_0(
            "distributed.tp_size=%d does not divide the %d pieces of the vocabulary: every rank "
            "holds all of the embedding and computes the whole loss; model.vocab_size=%d splits",
            *(tp.size, args.vocab_size, args.vocab_size + -args.vocab_size % tp.size),
            level=logging.WARNING,
        )
    for module in list(model.modules()):
        if isinstance(module, Mixer):
            module.split(tp)
        elif isinstance(module, FeedForward):
            split_linears(module, tp, outputs=("w1", "w3"), inputs=("w2",))


def split_vocabulary(model: nn.Module, tp: TensorParallel) -> None:
    """Embedding and, where it is not tied, head: each rank has the rows of its own pieces."""
    assert isinstance(model, LoopedTransformer)
    model.tok_embeddings = SplitEmbedding(model.tok_embeddings, tp)
    if not model.args.weight_tying:
        model.output = SplitLinear(model.output, tp, OUTPUTS)


def set_resharding(model: LoopedTransformer, between_loops: bool) -> None:
    """The part of distributed.reshard_between_loops that `set_gradient_sync` has to know."""
    model.reshard_between_loops = between_loops


def set_activation_checkpointing(model: LoopedTransformer, mode: str) -> None:
    """The part of distributed.activation_checkpointing that only the model can do: whole loops."""
    model.checkpoint_loops = mode == "loop"
