"""Checkpoints of a model on a GPU: a background save holds the state at its start."""

from __future__ import annotations

import pytest
import torch

from lingua.checkpoint import CheckpointArgs, CheckpointManager
from lingua.optim import OptimArgs, build_optimizer
from tests.lingua.checkpointing.checkpoint_runs import (
    CONFIG,
    STEPS,
    TrainState,
    assert_same_bits,
    tensors,
)
from tests.lingua.toy import make_batches, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def build():
    model = make_model().cuda()
    optimizer, scheduler = build_optimizer(model, OptimArgs(lr=0.05, warmup=4), STEPS)
    return model, optimizer, TrainState(scheduler)


def train(upto, model, optimizer, state):
    for tokens, target in make_batches(STEPS, 1)[state.step : upto, 0]:
        model(tokens.cuda(), target.cuda()).backward()
        optimizer.step()
        state.scheduler.step()
        optimizer.zero_grad()
        state.step += 1


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_holds_the_state_at_its_start(tmp_path, async_save):
    args = CheckpointArgs(path=str(tmp_path), async_save=async_save)
    run = build()
    train(2, *run)
    want, random_state = tensors(*run[:2]), torch.cuda.get_rng_state()
    with CheckpointManager.instantiate_and_make_dir(args) as manager:
        manager.save(*run, CONFIG)
        train(STEPS, *run)  # in place, so the save must hold copies
        torch.rand(3, device="cuda")

    fresh = build()
    loaded = manager.load(*fresh)
    assert loaded is not None and loaded.step == fresh[2].step == 2
    assert_same_bits(tensors(*fresh[:2]), want)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    train(3, *fresh)  # the loaded optimizer state must be on the right device
    assert all(p.is_cuda and p.isfinite().all() for p in fresh[0].parameters())
