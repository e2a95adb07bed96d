"""Training memory: exact parts against real shards and optimizers, peaks against measured runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live results. saved_tensors_hooks miss the inputs of checkpoints."""

    def __init__(self, model: LoopedTransformer):
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.parameters:
                storage = x.untyped_storage()
                self.found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def count(self) -> int:
        return sum(nbytes for weak, nbytes in self.found.values() if not weak.expired())


def live_bytes(args: LoopedTransformerArgs, tokens: torch.Tensor) -> tuple[int, int]:
    """Return what forward keeps, and what is left when the backward enters the last loop."""
    model, entered = LoopedTransformer(args), []
    model.init_weights()
    model.checkpoint_loops = True  # the loops keep their inputs alone, and run in the backward
    with LiveBytes(model) as live:
        loss = model(tokens, target=tokens)
        kept = live.count()
        model.layers[0].register_forward_pre_hook(lambda *_: entered.append(live.count()))
        loss.backward()
    return kept, entered[0]


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("loop_bptt", [None, 1, 2, 3])
def test_states_of_all_loops_wait_for_their_loss(loop_bptt, every):
    one = replace(SMALL, loop_count=4, loop_bptt=loop_bptt, mixer="full", attention_pattern=None)
    all_loops = replace(one, loop_loss="uniform", loop_loss_every=every)
    tokens = torch.randint(55, (2, 64))
    state = 4 * tokens.numel() * SMALL.dim
    (_, left_one), (kept, left) = (live_bytes(args, tokens) for args in (one, all_loops))
    memory_one, memory = (
        training_memory(
            build_on_meta(args), DistributedArgs(model_dtype="fp32"), batch_size=2, seqlen=64
        )
        for args in (one, all_loops)
    )
    assert memory.kept["loop"] / state == pytest.approx(kept / state, abs=0.1)
    more = memory.peak["loop"] - memory_one.peak["loop"]  # in the backward, which runs loops again
    assert more / state == pytest.approx((left - left_one) / state, abs=0.1)
