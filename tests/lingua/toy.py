"""A looped model of a few hundred weights, and a training loop for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from lingua import distributed as ld
from lingua.optim import OptimArgs, build_optimizer

VOCAB, DIM, LAYERS, LOOPS, ROWS, SEQLEN = 11, 6, 2, 3, 8, 5  # 11 and 6 / 4: uneven shards


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.w1 = nn.Linear(DIM, 2 * DIM)
        self.w2 = nn.Linear(2 * DIM, DIM, bias=False)

    def forward(self, x):
        return x + self.w2(torch.tanh(self.w1(self.norm(x))))


class Looped(nn.Module):
    """Run the same blocks LOOPS times in one forward, with a gate per loop."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.rho = nn.Parameter(torch.randn(LOOPS, DIM) * 0.1)
        self.output = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens, target):
        h = self.tok_embeddings(tokens)
        for gate in self.rho:
            u = h
            for layer in self.layers:
                h = layer(h)
            h = h + gate * u
        return F.cross_entropy(self.output(h).flatten(0, 1).float(), target.flatten())


PLAN = [("tok_embeddings", False), *ld.default_fsdp_grouping_plan(LAYERS), ("output", True)]


def make_model() -> Looped:
    torch.manual_seed(0)
    return Looped()


def make_batches(steps: int, accumulate: int):
    generator = torch.Generator().manual_seed(1)
    shape = (steps, accumulate, 2, ROWS, SEQLEN)
    return torch.randint(VOCAB, shape, generator=generator)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# fp32; several ranks sum in another order than one process
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def train(mesh, args: ld.DistributedArgs | None, *, steps=3, accumulate=2, clip=0.05):
    """Return losses, norms, gradients (before clipping) and final weights, not sharded."""
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
