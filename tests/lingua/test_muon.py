"""Muon: orthogonal updates of AdamW's size, only for the layers' matrices, sharded or not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lingua import muon
from lingua.args import dataclass_from_dict
from lingua.checkpoint import load_from_checkpoint
from lingua.errors import UserError
from lingua.muon import COEFFICIENTS, orthogonalize
from lingua.optim import MuonArgs, OptimArgs, build_optimizer
from tests.lingua.checkpointing.checkpoint_runs import TrainState, manager_at
from tests.lingua.dist_utils import run_ranks
from tests.lingua.toy import LAYERS, make_batches, make_model, whole
from tests.tolerances import FP32, assert_same

STEPS = 3


def constant(**options) -> OptimArgs:
    return OptimArgs(**({"name": "muon", "scheduler": "constant", "lr": 0.01} | options))


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 5)])
def test_singular_values_become_about_one(shape):
    torch.manual_seed(0)
    X = orthogonalize(torch.randn(shape), 5)
    assert X.shape == shape
    values = torch.linalg.svdvals(X)
    assert values.min() > 0.6 and values.max() < 1.25


def test_singular_vectors_do_not_change():
    """Newton-Schulz is an odd polynomial of the singular values."""
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(6, 9, dtype=torch.float64), full_matrices=False)
    S = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.1, 0.02], dtype=torch.float64)
    want = S / S.norm()
    for _ in range(5):
        a, b, c = COEFFICIENTS
        want = a * want + b * want**3 + c * want**5
    assert_same(orthogonalize(U * S @ Vh, 5), U * want @ Vh, FP32)


def test_a_zero_gradient_gives_a_zero_update():
    assert torch.equal(orthogonalize(torch.zeros(3, 4), 5), torch.zeros(3, 4))


def one_matrix(shape: tuple[int, int]) -> nn.Sequential:
    """A matrix for Muon and a norm for AdamW."""
    return nn.Sequential(nn.Linear(*shape[::-1], bias=False), nn.RMSNorm(shape[0]))


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_steps_match_the_formula(shape):
    torch.manual_seed(0)
    model = one_matrix(shape)
    weight = model[0].weight
    args = constant(lr=0.1, weight_decay=0.5, muon=MuonArgs(momentum=0.8))
    optimizer, scheduler = build_optimizer(model, args, 10)
    W, M = weight.detach().clone(), torch.zeros(shape)
    for _ in range(STEPS):
        G = torch.randn(shape)
        weight.grad = G.clone()
        optimizer.step()
        scheduler.step()
        M = 0.8 * M + G
        W = W * (1 - 0.1 * 0.5)
        W = W - 0.1 * 0.2 * math.sqrt(10) * orthogonalize(G + 0.8 * M, 5)
        assert_same(weight.detach(), W, FP32)


def test_updates_have_the_rms_of_adamw():
    """It is about 0.2 times the learning rate, for any shape and gradient."""
    for shape in ((32, 64), (64, 32)):
        model = one_matrix(shape)
        weight = model[0].weight
        optimizer, _ = build_optimizer(model, constant(weight_decay=0.0), 10)
        before = weight.detach().clone()
        weight.grad = 1e-3 * torch.randn(shape)
        optimizer.step()
        rms = (weight.detach() - before).square().mean().sqrt()
        assert 0.15 * 0.01 < rms < 0.25 * 0.01


def test_muon_updates_only_matrices_of_layers():
    model = make_model()
    optimizer, _ = build_optimizer(model, constant(), 10)
    names = {p: name for name, p in model.named_parameters()}
    muons = {names[p] for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    assert muons == {f"layers.{i}.w{k}.weight" for i in range(LAYERS) for k in (1, 2)}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
    decays = {names[p]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays["rho"] == 0 and decays["layers.0.w1.weight"] == decays["output.weight"] == 0.1


def test_all_groups_follow_the_schedule():
    args = OptimArgs(name="muon", warmup=4, lr=0.1)
    optimizer, scheduler = build_optimizer(make_model(), args, 10)
    for step in range(1, 5):
        for group in (*optimizer.param_groups, *optimizer.adamw.param_groups):  # pyright: ignore
            assert group["lr"] == pytest.approx(0.1 * step / 4)
        optimizer.step()
        scheduler.step()


def save(folder, model, optimizer, mesh=None):
    """Save a checkpoint and return its folder."""
    manager = manager_at(folder)
    manager.save(model, optimizer, TrainState(), {}, mesh)
    return manager.existing_saves[-1]


def train(model, optimizer, scheduler, batches) -> None:
    for micro_batches in batches:
        for tokens, target in micro_batches:
            (model(tokens, target) / len(micro_batches)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def test_resume_is_exact(tmp_path):
    batches = make_batches(2 * STEPS, 1)
    model = make_model()
    optimizer, scheduler = build_optimizer(model, constant(), 10)
    train(model, optimizer, scheduler, batches[:STEPS])
    folder = save(tmp_path, model, optimizer)
    train(model, optimizer, scheduler, batches[STEPS:])

    resumed = make_model()
    again, schedule = build_optimizer(resumed, constant(), 10)
    load_from_checkpoint(folder, resumed, again)
    schedule.load_state_dict({"last_epoch": STEPS})
    train(resumed, again, schedule, batches[STEPS:])
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("first, then", [("muon", "adamw"), ("adamw", "muon")])
def test_loading_the_state_of_another_optimizer_fails(first, then, tmp_path):
    model = make_model()
    optimizer, scheduler = build_optimizer(model, constant(name=first), 10)
    train(model, optimizer, scheduler, make_batches(1, 1))
    folder = save(tmp_path, model, optimizer)
    optimizer, _ = build_optimizer(model, constant(name=then), 10)
    with pytest.raises(UserError, match=r"optim\.name.*momentum_buffer"):
        load_from_checkpoint(folder, model, optimizer)


SHAPES = [(7, 5), (6, 12), (1, 3), (5, 5), (2, 9)]  # on four ranks: uneven and empty shards
LAYOUTS = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "replicated": ((4,), [Replicate()]),
    "replicated and sharded": ((2, 2), [Replicate(), Shard(0)]),
    "sharded twice": ((2, 2), [Shard(0), Shard(1)]),
}


def orthogonalize_sharded(rank, world_size):
    """Return whole results by layout, and how many elements this rank orthogonalized."""
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in SHAPES]
    results, work = {}, {}
    original = muon.orthogonalize
    for name, (size, placements) in LAYOUTS.items():
        mesh = init_device_mesh("cpu", size)
        params = [
            nn.Parameter(distribute_tensor(m, mesh, placements, src_data_rank=None))
            for m in matrices
        ]
        sizes: list[int] = []

        def count(matrix, n_steps, sizes=sizes):
            sizes.append(matrix.numel())
            return original(matrix, n_steps)

        muon.orthogonalize = count
        shards = {}
        for batch in muon._batches(params):
            own = [p.detach().to_local() for p in batch]  # pyright: ignore
            shards |= zip(batch, muon._orthogonalize_shards(batch, own, 5), strict=True)
        muon.orthogonalize = original
        results[name] = [
            DTensor.from_local(
                shards[p], mesh, placements, shape=p.shape, stride=p.stride()
            ).full_tensor()
            for p in params
        ]
        work[name] = sum(sizes)
    return results, work


def test_sharded_matrices_give_the_result_of_whole_ones():
    """Ranks that share matrices orthogonalize each of them once."""
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in SHAPES]
    ranks = run_ranks(4, orthogonalize_sharded)
    for results, _ in ranks:
        for name in LAYOUTS:
            for got, matrix in zip(results[name], matrices, strict=True):
                assert_same(got, orthogonalize(matrix, 5), FP32, name)
    size = sum(matrix.numel() for matrix in matrices)
    for name, times in {"rows": 1, "columns": 1, "replicated and sharded": 2}.items():
        assert sum(work[name] for _, work in ranks) == times * size, name


def train_sharded(rank, world_size, folder):
    """Return the weights after training with a save and a load halfway.

    All ranks have the whole batch, so averages over ranks change nothing.
    """
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp_shard",))
    batches = make_batches(2 * STEPS, 1)

    def make():
        model = make_model()
        vectors = {p for p in model.parameters() if p.ndim < 2} | {model.rho}
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, ignored_params=vectors)
        fully_shard(model, mesh=mesh, ignored_params=vectors)
        return model, *build_optimizer(model, constant(), 10)

    model, optimizer, scheduler = make()
    train(model, optimizer, scheduler, batches[:STEPS])
    saved = save(folder, model, optimizer, mesh)
    model, optimizer, scheduler = make()
    load_from_checkpoint(saved, model, optimizer)
    scheduler.load_state_dict({"last_epoch": STEPS})
    train(model, optimizer, scheduler, batches[STEPS:])
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


def test_sharded_training_matches_one_process(tmp_path):
    model = make_model()
    optimizer, scheduler = build_optimizer(model, constant(), 10)
    train(model, optimizer, scheduler, make_batches(2 * STEPS, 1))
    for weights in run_ranks(2, train_sharded, tmp_path):
        for name, param in model.named_parameters():
            assert_same(weights[name], param.detach(), FP32, name)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "lion"}, "optim.name=lion must be adamw or muon"),
        ({"muon": {"momentum": 1.0}}, "optim.muon.momentum=1.0"),
        ({"muon": {"newton_schulz_steps": 0}}, "optim.muon.newton_schulz_steps=0"),
    ],
)
def test_bad_values_name_their_option(options, message):
    with pytest.raises(UserError, match=message):
        dataclass_from_dict(OptimArgs, options)
