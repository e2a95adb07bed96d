"""A looped toy model on several ranks must train as it does in one process."""

from __future__ import annotations

import traceback

import pytest
import torch

from lingua import distributed as ld
from lingua.optim import OptimArgs, build_optimizer
from tests.lingua.dist_utils import run_ranks
from tests.lingua.toy import PLAN, ROWS, make_batches, make_model, whole

# fp32: ranks add up in another order than one process does
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def train(mesh, args: ld.DistributedArgs | None, *, steps=3, accumulate=2, clip=0.05):
    """Losses, norms, gradients (before clipping) and final weights, whole on every rank."""
    model = make_model()
    if args is not None:
        ld.parallelize_model(model, mesh, None, args, PLAN)
    optim = OptimArgs(lr=0.05, warmup=0, scheduler="constant", clip=clip)
    optimizer, scheduler = build_optimizer(model, optim, steps)
    rank, degree = ld.get_dp_rank_and_degree(mesh)
    losses, norms, grads = [], [], []
    for step_batches in make_batches(steps, accumulate):
        loss_sum = torch.zeros(())
        for i, (tokens, target) in enumerate(step_batches):
            mine = slice(rank * ROWS // degree, (rank + 1) * ROWS // degree)
            ld.set_gradient_sync(model, i == accumulate - 1)
            loss = model(tokens[mine], target[mine])
            (loss / accumulate).backward()
            loss_sum += loss.detach() / accumulate
        ld.sync_replicated_grads(model, mesh)
        grads.append({n: whole(p.grad).clone() for n, p in model.named_parameters()})
        norms.append(ld.clip_grad_norm_(model, optim.clip))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(ld.dist_mean(loss_sum).float())
    weights = {n: whole(p).detach() for n, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "grads": grads, "weights": weights}


def full(**kwargs):
    return {"fsdp_type": "full_shard", "model_dtype": "fp32", **kwargs}


TWO_RANKS = {
    "full_shard over dp_replicate": full(dp_replicate=2),
    "full_shard over dp_shard": full(dp_shard=2),
    "no_shard": {"dp_replicate": 2, "model_dtype": "fp32"},
    "full recomputation": full(dp_replicate=2, activation_checkpointing="full"),
    "selective recomputation": full(dp_replicate=2, selective_activation_checkpointing=True),
    "auto is fp32 on CPU": full(dp_replicate=2, model_dtype="auto"),
}
FOUR_RANKS = {"HSDP": full(dp_replicate=2, dp_shard=2)}


def compare_with_one_process(rank, world_size, cases):
    """None, or the traceback, for each case."""
    want = train(None, None)
    outcome = {}
    for name, kwargs in cases.items():
        try:
            args = ld.DistributedArgs(**kwargs)
            got = train(ld.get_device_mesh(args), args)
            torch.testing.assert_close(got, want, **TOLERANCE)
            outcome[name] = None
        except AssertionError:
            outcome[name] = traceback.format_exc()
    return outcome


@pytest.fixture(scope="module")
def outcomes():
    two = run_ranks(2, compare_with_one_process, TWO_RANKS)
    four = run_ranks(4, compare_with_one_process, FOUR_RANKS)
    return {name: [o[name] for o in ranks] for ranks in (two, four) for name in ranks[0]}


@pytest.mark.parametrize("case", [*TWO_RANKS, *FOUR_RANKS])
def test_ranks_train_as_one_process_does(outcomes, case):
    assert not any(outcomes[case]), outcomes[case]
