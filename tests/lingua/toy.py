"""A looped model of a few hundred weights, and its batches, to test distributed training with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from lingua.distributed import default_fsdp_grouping_plan

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
    """The same blocks run LOOPS times in one forward, with a gate per loop."""

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


PLAN = [("tok_embeddings", False), *default_fsdp_grouping_plan(LAYERS), ("output", True)]


def make_model() -> Looped:
    torch.manual_seed(0)
    return Looped()


def make_batches(steps: int, accumulate: int):
    generator = torch.Generator().manual_seed(1)
    shape = (steps, accumulate, 2, ROWS, SEQLEN)
    return torch.randint(VOCAB, shape, generator=generator)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
