"""Tensor parallelism learns what one process does, with every mixer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from apps.LT2.kernel import linear_cross_entropy as door
from apps.LT2.mixers import MIXERS, linear
from apps.LT2.mixers.kda import KDAArgs
from apps.LT2.mixers.mamba2 import Mamba2Args
from apps.LT2.parallel import (
    build_fsdp_grouping_plan,
    check_tensor_parallel,
    count_block_kinds,
    get_no_recompute_ops,
    set_gradient_sync,
    tp_parallelize,
)
from apps.LT2.transformer import LoopedTransformer
from lingua.checkpoint import FOLDER_NAME, CheckpointArgs, CheckpointManager, load_from_checkpoint
from lingua.distributed import (
    clip_grad_norm_,
    dist_mean,
    get_device_mesh,
    get_dp_rank_and_degree,
    parallelize_model,
    sync_replicated_grads,
)
from lingua.errors import UserError
from lingua.optim import OptimArgs, build_optimizer
from lingua.parallel.args import DistributedArgs
from tests.lingua.dist_utils import run_ranks
from tests.lingua.toy import whole
from tests.LT2.mixer_cases import QWEN
from tests.LT2.tiny import AtStep, tiny_model
from tests.tolerances import FP32_MODEL, differences

Options = dict[str, Any]
pytestmark = pytest.mark.slow

LOOPS, ROWS, SEQLEN = 2, 2, 16
STEP_1 = FOLDER_NAME.format(1)
WANTS = "wants.pt"  # the results of one process, for all ranks
# (kind in tests.LT2.tiny, options of `model:`, options of `distributed:` and the optimizer's name)
TWO = {"tp_size": 2, "fsdp_type": "full_shard"}
GROUPS = Mamba2Args(head_dim=16, state_dim=8, n_groups=2)
HYBRID = {"n_layers": 2, "attention_pattern": "1:1"}
NOT_SPLIT = {"nsa", "dsa"}
TWO_RANKS: dict[str, tuple[str, Options, Options]] = {
    **{mixer: (mixer, {"n_layers": 1}, TWO) for mixer in MIXERS if mixer not in NOT_SPLIT},
    "full": (
        "full",
        {"n_heads": 4, "n_kv_heads": 2, "gated_attn": True, "n_layers": 2, **QWEN},
        TWO,
    ),
    "kda": ("kda", {"n_layers": 1, "kda": KDAArgs(expand_v=2)}, TWO),
    "mamba2, groups": ("mamba2", {"n_layers": 1, "mamba2": GROUPS}, TWO),
    "no_shard": ("hybrid", HYBRID, {"tp_size": 2}),
    "muon": ("hybrid", HYBRID, {**TWO, "optim": "muon"}),
    "tied": ("full", {"n_layers": 1, "weight_tying": True}, TWO),
    "odd vocabulary": ("full", {"n_layers": 1, "vocab_size": 259}, TWO),
    **{
        f"{mode} recomputation": ("hybrid", HYBRID, {**TWO, "activation_checkpointing": mode})
        for mode in ("selective", "loop")
    },
}
FOUR = {**TWO, "dp_replicate": 2}
FOUR_RANKS: dict[str, tuple[str, Options, Options]] = {
    "dp_replicate": ("hybrid", HYBRID, FOUR),
    "dp_shard": ("mamba2", {"n_layers": 1}, {**TWO, "dp_shard": 2}),
    "muon, tied": (
        "hybrid",
        {**HYBRID, "weight_tying": True},
        {**TWO, "dp_shard": 2, "optim": "muon"},
    ),
    # 4 does not divide 258 tokens: the vocabulary stays whole on each rank.
    "tp_size=4": ("retnet", {"n_heads": 4, "n_layers": 1}, {**TWO, "tp_size": 4}),
    "tp_size=4, vocabulary, tied": (
        "full",
        {"n_heads": 4, "n_layers": 1, "vocab_size": 260, "weight_tying": True},
        {**TWO, "tp_size": 4},
    ),
}
# Replication, sharding and tensor parallelism together.
EIGHT_RANKS: dict[str, tuple[str, Options, Options]] = {
    "hsdp": ("full", {"n_layers": 1}, {**FOUR, "dp_shard": 2}),
}
# tests/LT2/test_compile.py compiles every mixer and recomputation; here blocks have what ranks add,
# which is the same for all mixers.
COMPILED: dict[str, tuple[str, Options, Options]] = {
    "heads": ("full", {"n_layers": 1}, {**TWO, "activation_checkpointing": "selective"}),
    "data": (
        "full",
        {"n_layers": 1},
        {**FOUR, "tp_size": 1, "activation_checkpointing": "loop"},
    ),
}


# ---- one step


def make(kind: str, options: Options) -> LoopedTransformer:
    """Make a model whose 1-D parameters differ from head to head."""
    model = tiny_model(kind, LOOPS, **options).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn(p.shape, generator=generator)
    return model


def make_parallel(kind: str, options: Options, distributed: Options) -> tuple[Any, Any]:
    args = DistributedArgs(model_dtype="fp32", **distributed)
    model, mesh = make(kind, options), get_device_mesh(args)
    model.checkpoint_loops = args.activation_checkpointing == "loop"
    plan = build_fsdp_grouping_plan(model.args)
    ops = get_no_recompute_ops()
    kinds = count_block_kinds(model)
    parallelize_model(model, mesh, model.args, args, plan, tp_parallelize, ops, kinds)
    return model, mesh


def optimizer_of(model: nn.Module, name: str = "adamw") -> Optimizer:
    # With a small epsilon AdamW takes a full step for the rounding error of a zero gradient.
    args = OptimArgs(name=name, lr=0.01, warmup=0, scheduler="constant", epsilon=1e-2)
    return build_optimizer(model, args, 1)[0]


def learn(
    model: LoopedTransformer, optimizer: Optimizer, mesh: Any, batches: tuple[int, int] = (2, ROWS)
) -> dict[str, Any]:
    """Take a clipped step; return loss, gradients, norm and the new weights, by name."""
    rank, degree = get_dp_rank_and_degree(mesh)
    generator = torch.Generator().manual_seed(2)
    loss_sum = torch.zeros(())
    n_micro = batches[0]
    for i, rows in enumerate(torch.randint(258, (*batches, SEQLEN), generator=generator)):
        mine = rows.chunk(degree)[rank]
        target = mine.clone()
        target[:, ::5] = -100
        set_gradient_sync(model, i == n_micro - 1)
        loss = model(mine, target) / n_micro
        loss.backward()
        loss_sum += loss.detach()
    sync_replicated_grads(model, mesh)
    seen = {"loss": dist_mean(loss_sum)}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        seen[f"{name}.grad"] = whole(p.grad).clone()
    seen["norm"] = clip_grad_norm_(model, 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return seen | {n: whole(p).detach() for n, p in model.named_parameters()}


def learn_cases(rank: int, world_size: int, cases: dict, folder: Path) -> dict[str, str]:
    """Compare each case, and on up to four ranks the first one's checkpoints, with one process."""
    door.CHUNK_TOKENS = 12  # the loss in several chunks
    # As with many tokens: separate input products on two ranks, joined ones on more.
    linear.FUSE_TOKENS, linear.WIDE = 1, 1 if world_size == 2 else linear.WIDE
    wants = torch.load(folder / WANTS)
    outcome, batches = {}, batches_of(world_size)
    for name, (kind, options, distributed) in cases.items():
        distributed = dict(distributed)
        optim = distributed.pop("optim", "adamw")
        model, mesh = make_parallel(kind, options, distributed)
        optimizer = optimizer_of(model, optim)
        got = learn(model, optimizer, mesh, batches)
        outcome[name] = differences(got, wants[name], FP32_MODEL)
        if "loaded" in wants and name == next(iter(cases)):
            manager(folder / "by_ranks").save(model, optimizer, AtStep(1), {}, mesh)
            fresh, mesh = make_parallel(kind, {**options, "seed": 5}, distributed)
            optimizer = optimizer_of(fresh)
            load_from_checkpoint(str(folder / "by_one" / STEP_1), fresh, optimizer)
            got = learn(fresh, optimizer, mesh, batches)
            outcome["loaded"] = differences(got, wants["loaded"], FP32_MODEL)
    return outcome


def first_step(
    kind: str, options: Options, distributed: Options, batches: tuple[int, int]
) -> dict[str, Any]:
    """Return the results of one process for a case."""
    model = make(kind, options)
    return learn(model, optimizer_of(model, distributed.get("optim", "adamw")), None, batches)


def batches_of(world_size: int) -> tuple[int, int]:
    """Return micro-batches and rows of each: at least one per rank that reads data.

    tests/LT2/test_loop_traffic.py has more micro-batches on two ranks.
    """
    return (1 if world_size == 2 else 2), max(ROWS, world_size // 2)


def second_step(
    kind: str, options: Options, batches: tuple[int, int], save_to: Path
) -> dict[str, Any]:
    """Return the results of one process's second step; save the first."""
    model = make(kind, options)
    optimizer = optimizer_of(model)
    learn(model, optimizer, None, batches)
    manager(save_to).save(model, optimizer, AtStep(1), {})
    return learn(model, optimizer, None, batches)


def manager(folder: Path) -> CheckpointManager:
    return CheckpointManager.instantiate_and_make_dir(CheckpointArgs(path=str(folder)))


def run_cases(world_size: int, cases: dict, folder: Path) -> list[dict[str, str]]:
    """Run the cases on ranks; on up to four, also pass a checkpoint to the ranks and back."""
    (kind, options, _), batches = next(iter(cases.values())), batches_of(world_size)
    wants = {name: first_step(*case, batches) for name, case in cases.items()}
    if exchange := world_size <= 4:
        wants["loaded"] = second_step(kind, options, batches, folder / "by_one")
    torch.save(wants, folder / WANTS)
    outcomes = run_ranks(world_size, learn_cases, cases, folder)
    if exchange:
        model = make(kind, {**options, "seed": 5})
        optimizer = optimizer_of(model)
        load_from_checkpoint(str(folder / "by_ranks" / STEP_1), model, optimizer)
        got = learn(model, optimizer, None, batches)
        outcomes.append({"saved": differences(got, wants["loaded"], FP32_MODEL)})
    return outcomes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_cases(2, TWO_RANKS, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run_cases(4, FOUR_RANKS, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def eight_ranks(tmp_path_factory):
    return run_cases(8, EIGHT_RANKS, tmp_path_factory.mktemp("eight"))


@pytest.mark.parametrize("case", [*TWO_RANKS, "loaded", "saved"])
def test_two_ranks_learn_what_one_process_does(two_ranks, case):
    wrong = [outcome[case] for outcome in two_ranks if case in outcome]
    assert wrong and not any(wrong), max(wrong)


@pytest.mark.parametrize("case", [*FOUR_RANKS, "loaded", "saved"])
def test_four_ranks_learn_what_one_process_does(four_ranks, case):
    wrong = [outcome[case] for outcome in four_ranks if case in outcome]
    assert wrong and not any(wrong), max(wrong)


@pytest.mark.parametrize("case", EIGHT_RANKS)
def test_eight_ranks_learn_what_one_process_does(eight_ranks, case):
    wrong = [outcome[case] for outcome in eight_ranks if case in outcome]
    assert wrong and not any(wrong), max(wrong)


def learn_compiled(rank: int, world_size: int) -> dict[str, str]:
    # Inductor would take minutes, and wrappers affect only the graph it gets.
    torch.compile = partial(torch.compile, backend="aot_eager", fullgraph=True)
    outcome = {}
    for name, (kind, options, distributed) in COMPILED.items():
        torch._dynamo.reset()
        model, mesh = make_parallel(kind, options, {**distributed, "compile": True})
        single = make(kind, options)
        want = learn(single, optimizer_of(single), None)
        outcome[name] = differences(learn(model, optimizer_of(model), mesh), want, FP32_MODEL)
    return outcome


@pytest.fixture(scope="module")
def compiled():
    return run_ranks(2, learn_compiled)


@pytest.mark.parametrize("case", COMPILED)
def test_blocks_compile_into_one_graph_on_ranks(compiled, case):
    wrong = [outcome[case] for outcome in compiled]
    assert not any(wrong), max(wrong)


# ---- errors


@pytest.mark.parametrize(
    "kind, options, tp_size, match",
    [
        ("nsa", {}, 2, r"nsa \(layers\.0\.nsa\)"),
        ("dsa", {}, 2, r"dsa \(layers\.0\.dsa\)"),
        ("gdn+dsa", {}, 2, r"dsa \(layers\.2\.dsa\)"),
        ("full", {"n_heads": 4, "n_kv_heads": 1}, 2, r"model\.n_kv_heads.* 1\b"),
        ("full", {}, 4, r"model\.n_heads.* 2\b"),
        ("gdn", {}, 4, r"model\.gdn\.n_heads.* 2\b"),
        ("kda", {"dim": 28, "n_heads": 4}, 2, r"model\.kda\.head_dim.* 7\b"),
        (
            "mamba2",
            {"mamba2": Mamba2Args(head_dim=16, n_groups=2)},
            4,
            r"model\.mamba2\.n_groups.* 2\b",
        ),
        ("full", {"n_heads": 3, "head_dim": 4, "multiple_of": 5}, 3, r"model\.multiple_of.* 85\b"),
    ],
)
def test_a_model_that_does_not_split_is_a_user_error(kind, options, tp_size, match):
    with torch.device("meta"):
        model = LoopedTransformer(tiny_model(kind, 1, **options).args)
    with pytest.raises(UserError, match=f"^distributed.tp_size={tp_size}.*{match}"):
        check_tensor_parallel(model, tp_size)
