"""Training memory: exact parts against real shards and optimizers, peaks against measured runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from apps.LT2.memory import training_memory
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs, build_on_meta
from lingua.distributed import fit_to_world
from lingua.optim import OptimArgs, build_optimizer, is_matrix
from lingua.parallel.args import DistributedArgs
from tests.LT2.golden import CONFIGS, read_recipe

GIB = 2**30
SMALL = LoopedTransformerArgs(
    dim=36,
    n_heads=2,
    n_layers=3,
    loop_count=2,
    mixer="gdn",
    attention_pattern="2:1",
    vocab_size=55,
    gdn=GatedDeltaNetArgs(head_dim=13),
)
HYBRID, HYBRID_1B = "600M/looped_hybrid_gdn_4to1_600M", "1B/looped_hybrid_gdn_4to1_1B"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_state_are_exact(name):
    model = LoopedTransformer(SMALL)
    model.init_weights()
    optimizer, _ = build_optimizer(model, OptimArgs(name=name, warmup=0), n_steps=1)
    tokens = torch.randint(55, (1, 8))
    model(tokens, target=tokens).backward()
    optimizer.step()
    memory = training_memory(model, DistributedArgs(), batch_size=1, seqlen=8, muon=name == "muon")
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert memory.gradients == sum(grad.nbytes for grad in grads)
    state = optimizer.state_dict()["state"].values()
    tensors = [value for values in state for value in values.values()]
    assert memory.optimizer == sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def test_shards_are_those_of_fsdp():
    """4 ranks don't divide 55 tokens or 26 channels; rank 0 has the largest shards."""
    model = build_on_meta(SMALL)
    args = fit_to_world(DistributedArgs(fsdp_type="full_shard"), 4)
    memory = training_memory(model, args, batch_size=1, seqlen=8)
    gathered = sum(2 * p.numel() for name, p in model.named_parameters() if is_matrix(name, p))
    assert memory.gathered == gathered
    assert not dist.is_initialized()
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        whole = {p for name, p in model.named_parameters() if not is_matrix(name, p)}
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)), ignored_params=whole)
        local = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    finally:
        dist.destroy_process_group()
    assert memory.weights == sum(p.nbytes for p in local)


@pytest.mark.parametrize(
    "recipe, mode, batch_size, gib, options",
    [
        ("600M/looped_pure_full_600M", "selective", 6, 63.7, {}),
        ("600M/looped_pure_retnet_600M", "selective", 6, 64.9, {}),
        ("600M/looped_pure_deltanet_600M", "selective", 6, 66.2, {}),
        ("600M/looped_pure_mamba2_600M", "selective", 6, 64.3, {}),
        ("600M/looped_pure_hgrn2_600M", "selective", 4, 54.7, {}),
        ("600M/looped_pure_kda_600M", "selective", 4, 59.8, {}),
        ("600M/looped_pure_nsa_600M", "selective", 4, 52.1, {}),
        ("600M/looped_pure_dsa_600M", "selective", 6, 65.7, {}),
        (HYBRID_1B, "selective", 4, 91.88, {}),
        (HYBRID_1B, "selective", 2, 57.2, {}),
        ("600M/transformer_600M", "none", 12, 47.7, {}),
        ("600M/looped_pure_retnet_600M", "none", 3, 57.1, {}),
        ("600M/looped_pure_nsa_600M", "none", 3, 62.7, {}),
        ("600M/looped_pure_hgrn2_600M", "none", 3, 64.4, {}),
        (HYBRID, "none", 3, 61.45, {}),
        (HYBRID, "none", 3, 58.89, {"ngpu": 2}),
        (HYBRID, "selective", 3, 35.29, {"ngpu": 2}),
        (HYBRID, "full", 3, 8.86, {"ngpu": 2}),
        (HYBRID, "loop", 3, 17.92, {"ngpu": 2}),
        (HYBRID, "loop", 3, 19.67, {"loop_count": 1}),
        ("600M/looped_hybrid_128_256_512_full_600M", "none", 3, 48.7, {}),
        (HYBRID, "selective", 6, 64.1, {"ngpu": 4, "dp_shard": 2}),
        (HYBRID, "selective", 12, 71.2, {"ngpu": 2, "tp_size": 2}),
        (HYBRID, "selective", 12, 70.0, {"ngpu": 4, "tp_size": 2}),
    ],
)
def test_peaks_are_close_to_measured_runs(recipe, mode, batch_size, gib, options):
    """GiB on an H100 or H200, from the reports in docs/benchmarks."""
    args, options = read_recipe(CONFIGS / f"{recipe}.yaml"), dict(options)
    ngpu, loop_count = options.pop("ngpu", 1), options.pop("loop_count", args.model.loop_count)
    distributed = fit_to_world(replace(args.distributed, **options), ngpu)
    memory = training_memory(
        build_on_meta(replace(args.model, loop_count=loop_count)),
        distributed,
        batch_size=batch_size,
        seqlen=4096,
    )
    assert memory.peak[mode] / GIB == pytest.approx(gib, rel=0.05)
