"""Loops add no communication: weights are gathered and gradients reduced once per step.

Counted on two ranks with every kind of recomputation; gradients equal those of one process. Tensor
parallelism all-reduces activations, so it communicates in every loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.LT2.parallel import (
    build_fsdp_grouping_plan,
    get_no_recompute_ops,
    set_gradient_sync,
    tp_parallelize,
)
from apps.LT2.transformer import LoopedTransformer
from lingua.distributed import (
    get_device_mesh,
    get_dp_rank_and_degree,
    parallelize_model,
    sync_replicated_grads,
)
from lingua.parallel.args import ACTIVATION_CHECKPOINTING, DistributedArgs
from tests.lingua.dist_utils import OpCounter, run_ranks
from tests.lingua.toy import whole
from tests.LT2.tiny import tiny_model
from tests.tolerances import FP32_MODEL, differences

pytestmark = pytest.mark.slow

N_LAYERS, WORLD = 2, 2
# In the second a layer's attention runs only in late loops: its gradient is complete early.
PATTERNS = {1: "retnet,full", 3: "retnet->full->full"}
N_UNITS = N_LAYERS + 1  # and the root: embedding and head

FULL_SHARD = {"fsdp_type": "full_shard", "dp_replicate": WORLD}
RESHARD = {**FULL_SHARD, "reshard_between_loops": True}

# (loops, micro-batches, distributed options, collectives of a step)
CASES: dict[str, tuple[Any, int, dict, dict[str, int]]] = {
    f"{mode} T={loops} micro-batches={n_micro}": (
        loops,
        n_micro,
        {**FULL_SHARD, "activation_checkpointing": mode},
        {"_allgather_base_": N_UNITS, "_reduce_scatter_base_": N_UNITS},
    )
    for mode, loops, n_micro in (
        ("none", 1, 1),
        *((mode, 3, 2) for mode in ACTIVATION_CHECKPOINTING),
    )
}
CASES["no_shard"] = (3, 2, {"dp_replicate": WORLD}, {"allreduce_": N_UNITS})
# Gathered for every loop of forward and backward; still reduced once.
for n_micro in (1, 2):
    n_gathered = n_micro * (2 * 3 * N_LAYERS + 1)
    counts = {"_allgather_base_": n_gathered, "_reduce_scatter_base_": N_UNITS}
    CASES[f"reshard_between_loops micro-batches={n_micro}"] = (3, n_micro, RESHARD, counts)
# Steps of fewer loops than the model has, and gradients through the last loops only.
OPTIONS: dict[int | str, dict[str, Any]] = {
    "2 of T=3": {"loop_schedule": "2@0"},
    "1 of T=3": {"loop_schedule": "1@0"},
    "bptt 2 of T=3": {"loop_bptt": 2},
    "bptt 1 of T=3": {"loop_bptt": 1},
    "gate T=3": {"loop_loss": "gate"},
    "weights, bptt 2 of T=3": {"loop_loss": [1, 2, 4], "loop_bptt": 2},
}
for name, n_micro, mode in (
    ("2 of T=3", 2, "none"),
    ("1 of T=3", 1, "loop"),
    ("bptt 2 of T=3", 2, "loop"),
    ("bptt 1 of T=3", 1, "none"),
    ("gate T=3", 2, "loop"),
    ("weights, bptt 2 of T=3", 1, "none"),
):
    options = {**FULL_SHARD, "activation_checkpointing": mode}
    counts = {"_allgather_base_": N_UNITS, "_reduce_scatter_base_": N_UNITS}
    CASES[f"{name} {mode} micro-batches={n_micro}"] = (name, n_micro, options, counts)
counts = {"_allgather_base_": (3 + 2) * N_LAYERS + 1, "_reduce_scatter_base_": N_UNITS}
CASES["reshard_between_loops bptt 2 of T=3"] = ("bptt 2 of T=3", 1, RESHARD, counts)
# An all-reduce after mixer and feed-forward of each layer in the forward, and before them in the
# backward; one after the embedding and one before the head. The loss: two numbers a token.
for mode, loops, n_micro in (("none", 3, 2), ("selective", 3, 1)):
    n_sums = n_micro * (2 * 2 * loops * N_LAYERS + 2)
    options = {"fsdp_type": "full_shard", "tp_size": WORLD, "activation_checkpointing": mode}
    counts = {"all_reduce": n_sums, "all_gather": n_micro}
    CASES[f"tp_size {mode} T={loops} micro-batches={n_micro}"] = (loops, n_micro, options, counts)
options = {"fsdp_type": "full_shard", "tp_size": WORLD}
counts = {"all_reduce": 2 * (3 + 2) * N_LAYERS + 2, "all_gather": 1}
CASES["tp_size bptt 2 of T=3"] = ("bptt 2 of T=3", 1, options, counts)
# The losses of all loops: one all-reduce before the head, and two numbers a token in one chunk.
counts = {"all_reduce": 2 * 2 * 3 * N_LAYERS + 2, "all_gather": 1}
CASES["tp_size gate T=3"] = ("gate T=3", 1, options, counts)
COLLECTIVES = (
    *("_allgather_base_", "_reduce_scatter_base_", "allreduce_"),
    *("all_reduce", "all_gather"),  # of lingua.parallel.tensor_parallel
)


def make(loops: int | str) -> LoopedTransformer:
    loop_count = loops if isinstance(loops, int) else 3
    options = {"n_layers": N_LAYERS, "attention_pattern": PATTERNS[loop_count]}
    options |= OPTIONS.get(loops, {})
    model = tiny_model("hybrid", loop_count, **options).requires_grad_(True)
    model.begin_step(0)
    return model


def parallel_model(loops: int | str, options: dict) -> tuple[LoopedTransformer, Any]:
    args = DistributedArgs(model_dtype="fp32", **options)
    mesh, model = get_device_mesh(args), make(loops)
    model.checkpoint_loops = args.activation_checkpointing == "loop"
    model.reshard_between_loops = args.reshard_between_loops
    plan = build_fsdp_grouping_plan(model.args, reshard_between_loops=args.reshard_between_loops)
    ops = get_no_recompute_ops()
    parallelize_model(model, mesh, model.args, args, plan, tp_parallelize, ops)
    return model, mesh


def batches(n_micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(258, (n_micro, WORLD, 16), generator=generator)


def backward(model: LoopedTransformer, micro_batches: Tensor) -> None:
    for i, tokens in enumerate(micro_batches):
        set_gradient_sync(model, i == len(micro_batches) - 1)
        (model(tokens, tokens) / len(micro_batches)).backward()


def wanted(loops: int | str, n_micro: int) -> dict[str, Tensor]:
    """Return the gradients of one process."""
    model = make(loops)
    backward(model, batches(n_micro))
    return gradients(model)


def gradients(model: LoopedTransformer) -> dict[str, Tensor]:
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def count_cases(rank: int, world_size: int, wants: Path) -> dict[str, tuple[dict[str, int], str]]:
    """Return the collectives of a step and its wrong gradients, for each case."""
    outcome, want = {}, torch.load(wants)
    for name, (loops, n_micro, options, _) in CASES.items():
        model, mesh = parallel_model(loops, options)
        dp_rank, degree = get_dp_rank_and_degree(mesh)
        with OpCounter() as ops:
            backward(model, batches(n_micro).chunk(degree, dim=1)[dp_rank])
        counts = {c: ops.counts[c] for c in COLLECTIVES if ops.counts[c]}
        sync_replicated_grads(model, mesh)
        outcome[name] = counts, differences(gradients(model), want[loops, n_micro], FP32_MODEL)
    return outcome


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    wants = tmp_path_factory.mktemp("wants") / "gradients.pt"
    steps = {(loops, n_micro) for loops, n_micro, *_ in CASES.values()}
    torch.save({step: wanted(*step) for step in steps}, wants)
    return run_ranks(WORLD, count_cases, wants)


@pytest.mark.parametrize("case", CASES)
def test_collectives_of_a_step(two_ranks, case):
    want = CASES[case][-1]
    assert [outcome[case] for outcome in two_ranks] == [(want, "")] * WORLD
