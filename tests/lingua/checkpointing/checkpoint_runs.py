"""Small runs to save and resume, shared by the tests of checkpoints."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

import lingua.checkpointing.metadata
import lingua.checkpointing.save
from lingua import distributed as ld
from lingua.checkpoint import CheckpointArgs, CheckpointManager
from lingua.checkpointing.dcp import optimizer_state
from lingua.optim import OptimArgs, build_optimizer
from tests.lingua.toy import PLAN, ROWS, make_batches, make_model, whole

STEPS, STOP = 6, 3
N_FILES = 3  # of a rank that writes in threads
CONFIG = {"optim": {"lr": 0.05, "clip": 1.0}, "steps": STEPS}


class TrainState:
    def __init__(self, scheduler=None):
        self.step = 0
        self.scheduler = scheduler

    def state_dict(self):
        return {"step": self.step, "scheduler": self.scheduler and self.scheduler.state_dict()}

    def load_state_dict(self, state_dict):
        self.step = state_dict["step"]
        if self.scheduler:
            self.scheduler.load_state_dict(state_dict["scheduler"])

    def load_state_dicts(self, states, rank, n_ranks):
        self.load_state_dict(states[rank % len(states)])
        self.from_ranks = len(states)


def manager_at(folder: Path, **kwargs) -> CheckpointManager:
    return CheckpointManager.instantiate_and_make_dir(CheckpointArgs(path=str(folder), **kwargs))


def build(mesh=None, args=None):
    model = make_model()
    if args is not None:
        ld.parallelize_model(model, mesh, None, args, PLAN)
    optimizer, scheduler = build_optimizer(model, OptimArgs(lr=0.05, warmup=4), STEPS)
    return model, optimizer, TrainState(scheduler)


def train(upto, model, optimizer, state, mesh=None):
    """Train with noise from every random generator, so a resume must restore them all."""
    rank, degree = ld.get_dp_rank_and_degree(mesh)
    mine = slice(rank * ROWS // degree, (rank + 1) * ROWS // degree)
    log = []
    for tokens, target in make_batches(STEPS, 1)[state.step : upto, 0]:
        lr = optimizer.param_groups[0]["lr"]
        noise = 1 + 0.1 * (torch.rand(()).item() + random.random() + np.random.rand())
        loss = model(tokens[mine], target[mine]) * noise
        loss.backward()
        ld.sync_replicated_grads(model, mesh)
        norm = ld.clip_grad_norm_(model, 1.0)
        optimizer.step()
        state.scheduler.step()
        optimizer.zero_grad()
        state.step += 1
        log.append((state.step, lr, loss.item(), norm.item()))
    return log


def tensors(model, optimizer):
    moments = optimizer_state(model, optimizer)
    return {
        "model": {n: whole(p).detach().clone() for n, p in model.named_parameters()},
        "optim": {n: {k: whole(t).clone() for k, t in s.items()} for n, s in moments.items()},
    }


def assert_same_bits(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def truncate_tensors(folder):
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])


def write_in_threads(monkeypatch):
    """Let saves and loads of small models use N_FILES threads."""
    monkeypatch.setattr(lingua.checkpointing.save, "MIN_SHARE", 1)
    monkeypatch.setattr(lingua.checkpointing.metadata.os, "cpu_count", lambda: N_FILES)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
