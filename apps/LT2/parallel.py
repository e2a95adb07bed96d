"""How a looped model is spread over devices: the hooks that `parallelize_model` calls."""

from __future__ import annotations

import logging
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
    """Return the FSDP units: (module path, whether its forward frees the gathered weights).

    A layer runs `loop_count` times, so by default it stays gathered from its first forward to its
    backward. Freed, it would be gathered again in each loop.
    """
    return [(f"layers.{i}", reshard_between_loops) for i in range(args.n_layers)]


def set_gradient_sync(model: LoopedTransformer, is_last: bool) -> None:
    """Prepare for a micro-batch; `is_last`: the optimizer step comes after it.

    The backward passes a looped layer once per loop, and FSDP would free and gather its weights
    each time. Here the layer stays gathered until the backward enters its last pass, loop 0. Then
    its gradient, the sum over loops and micro-batches, is reduced, and its weights are freed if
    this was the last micro-batch. With loop_bptt, FSDP would then prefetch the layer that ran
    before, in a loop without gradients.
    """
    free, n_backward = model.reshard_between_loops, model.n_backward_loops(model.n_loops)
    gradients.set_backward_prefetch(model.layers[0], True)

    def finish() -> None:
        gradients.set_gradient_sync(model, is_last, reshard=is_last or free)
        if n_backward < model.n_loops:
            gradients.set_backward_prefetch(model.layers[0], False)

    if n_backward == 1:
        finish()
    else:
        gradients.set_gradient_sync(model, False, reshard=free)
        model.before_last_backward = finish


def get_no_recompute_ops() -> set[Any]:
    """Return the mixers' kernels, whose results selective activation checkpointing keeps."""
    lt2 = torch.ops.lt2  # registered when the mixers are imported
    return {
        lt2.gated_delta_rule.default,
        lt2.kda.default,
        lt2.delta_rule.default,
        lt2.simple_gla.default,
        lt2.gla.default,
        lt2.nsa_compressed.default,
        lt2.nsa_selected.default,
        lt2.dsa.default,
        torch.ops.torch_attn._varlen_attn.default,
    }


def count_block_kinds(model: LoopedTransformer) -> int:
    """Count the (mixer, window) pairs over all loops: each is compiled separately."""
    return len({spec for loop in model.inference_layout for spec in loop})


def check_tensor_parallel(model: nn.Module, tp_size: int) -> None:
    """Raise UserError unless `tp_size` divides the heads and channels of every layer."""
    if tp_size == 1:
        return
    for name, module in model.named_modules():
        if isinstance(module, Mixer):
            plan = module.tp_plan()
            if plan is None:
                raise UserError(
                    f"distributed.tp_size={tp_size}: {module.module_name} ({name}) can't be split "
                    "by heads; use 1, with distributed.fsdp_type=full_shard for memory"
                )
            for what, size in plan.divides.items():
                check_divides(tp_size, size, f"{what} of {module.module_name}")
        elif isinstance(module, FeedForward):
            check_divides(tp_size, module.hidden_dim, "the feed-forward dim (model.multiple_of)")


def tp_parallelize(
    model: nn.Module,
    tp_mesh: DeviceMesh,
    args: LoopedTransformerArgs,
    dist_args: DistributedArgs,
) -> None:
    """Split heads, feed-forward channels and vocabulary over `tp_mesh`, in place.

    If the ranks don't divide the vocabulary, each rank holds the whole embedding and head.
    """
    check_tensor_parallel(model, tp_mesh.size())
    tp = TensorParallel(tp_mesh)
    if args.vocab_size % tp.size == 0:
        split_vocabulary(model, tp)
    else:
        log_on_rank_0(
            "distributed.tp_size=%d does not divide the %d tokens of the vocabulary, so every rank "
            "holds the whole embedding and computes the whole loss; model.vocab_size=%d would "
            "divide",
            *(tp.size, args.vocab_size, args.vocab_size + -args.vocab_size % tp.size),
            level=logging.WARNING,
        )
    for module in list(model.modules()):
        if isinstance(module, Mixer):
            plan = module.tp_plan()
            assert plan is not None, "check_tensor_parallel has found one"
            plan.split(module, tp)
        elif isinstance(module, FeedForward):
            split_linears(module, tp, outputs=("w1", "w3"), inputs=("w2",))


def split_vocabulary(model: nn.Module, tp: TensorParallel) -> None:
    """Split the rows of the embedding and of an untied head over the ranks, in place."""
    assert isinstance(model, LoopedTransformer)
    model.tok_embeddings = SplitEmbedding(model.tok_embeddings, tp)
    if not model.args.weight_tying:
        model.output = SplitLinear(model.output, tp, OUTPUTS)
