"""Muon in bf16, and with matrices sharded over two GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lingua.muon import orthogonalize
from lingua.optim import OptimArgs, build_optimizer

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
SHAPES = [
    (256, 1024),
    (1024, 256),
    (512, 512),
    (8, 256),
    (7, 33),
]  # five matrices on two ranks, one uneven


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_keeps_singular_values_near_one_and_the_direction(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    got = orthogonalize(matrix.cuda(), 5)
    assert got.dtype == torch.bfloat16
    values = torch.linalg.svdvals(got.float())
    assert values.max() < 1.3
    if shape[0] != shape[1]:  # a random square matrix has very small singular values
        assert values.min() > 0.55
    want = orthogonalize(matrix, 5)
    assert torch.cosine_similarity(got.float().cpu().flatten(), want.flatten(), dim=0) > 0.999


def test_master_weights_stay_in_fp32():
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.RMSNorm(32)).cuda()
    optimizer, _ = build_optimizer(model, OptimArgs(name="muon", warmup=0, lr=1e-4), 10)
    before = model[0].weight.detach().clone()
    # Use as many tokens as inputs: a rank-deficient gradient gives a smaller update.
    model(torch.randn(64, 64, device="cuda")).square().sum().backward()
    optimizer.step()
    assert model[0].weight.dtype == torch.float32
    assert optimizer.state[model[0].weight]["momentum_buffer"].dtype == torch.float32
    rms = (model[0].weight.detach() - before).square().mean().sqrt()
    assert 0.14 * 1e-4 < rms < 0.26 * 1e-4, "bf16 weights could not change by so little"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sharded_step_on_two_gpus_matches_one():
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, __file__],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def step_on_this_rank() -> None:
    """Take a step with whole matrices, and with shards of rows or columns; compare."""
    rank, has_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (2,))
    for dim in (0, 1):
        torch.manual_seed(0)
        whole = [torch.randn(shape, device=device) for shape in SHAPES]
        grads = [torch.randn(shape, device=device) for shape in SHAPES]
        moved = []
        for placements in (None, [Shard(dim)]):
            model = nn.ParameterList(
                nn.Parameter(
                    w.clone()
                    if placements is None
                    else distribute_tensor(w.clone(), mesh, placements, src_data_rank=None)
                )
                for w in whole
            )
            model.norm = nn.Parameter(torch.ones(4, device=device))  # for AdamW
            optimizer, _ = build_optimizer(model, OptimArgs(name="muon", warmup=0, lr=0.1), 10)
            for p, grad in zip(model, grads, strict=False):
                p.grad = (
                    grad.clone()
                    if placements is None
                    else distribute_tensor(grad.clone(), mesh, placements, src_data_rank=None)
                )
            optimizer.step()
            parameters = [model[i].detach() for i in range(len(SHAPES))]
            moved.append([p.full_tensor() if placements else p for p in parameters])
        for alone, sharded in zip(*moved, strict=True):
            torch.testing.assert_close(sharded, alone, rtol=0, atol=1e-5)
    dist.destroy_process_group()


if __name__ == "__main__":
    step_on_this_rank()
