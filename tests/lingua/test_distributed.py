"""A looped toy model trains on several ranks as in one process."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lingua import distributed as ld
from lingua.errors import MachineFault, UserError
from lingua.parallel.args import unused_options
from tests.lingua.dist_utils import RANK_NAMES, OpCounter, run_ranks
from tests.lingua.toy import PLAN, TOLERANCE, make_batches, make_model, train, whole


def full(**kwargs):
    return {"fsdp_type": "full_shard", "model_dtype": "fp32", **kwargs}


TWO_RANKS = {
    "full_shard over dp_replicate": full(dp_replicate=2),
    "full_shard over dp_shard": full(dp_shard=2),
    "no_shard": {"dp_replicate": 2, "model_dtype": "fp32"},
    "full recomputation": full(dp_replicate=2, activation_checkpointing="full"),
    "selective recomputation": full(dp_replicate=2, selective_activation_checkpointing=True),
}
# tests/LT2/test_tensor_parallel.py has HSDP on eight ranks.


def compare_with_one_process():
    """Return None or a traceback for each case."""
    want = train(None, None)
    outcome = {}
    for name, kwargs in TWO_RANKS.items():
        try:
            args = ld.DistributedArgs(**kwargs)
            got = train(ld.get_device_mesh(args), args)
            torch.testing.assert_close(got, want, **TOLERANCE)
            outcome[name] = None
        except AssertionError:
            outcome[name] = traceback.format_exc()
    return outcome


def check_two_ranks(rank, world_size):
    check_reductions(rank, world_size)
    check_meshes(rank, world_size)
    return compare_with_one_process(), check_clip(rank, world_size)


@pytest.fixture(scope="module")
def two_ranks():
    """Run all checks in one start of the ranks, because the start is slow."""
    return run_ranks(2, check_two_ranks)


def test_too_long_tmpdir_is_reported(monkeypatch):
    def fail():
        raise OSError("AF_UNIX path too long")

    before = multiprocessing.get_start_method(allow_none=True)
    monkeypatch.setattr(multiprocessing.forkserver, "ensure_running", fail)
    try:
        with pytest.raises(UserError, match="TMPDIR=.*too long"):
            ld.setup_torch_distributed(ld.DistributedArgs())
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks_match_one_process(two_ranks, case):
    assert [outcomes[case] for outcomes, _ in two_ranks] == [None, None]


def test_nan_on_one_rank_is_in_the_norm_of_all(two_ranks):
    assert [norm_is_nan for _, norm_is_nan in two_ranks] == [True, True]


# ---- precision


class TypeSpy(nn.Module):
    """Record the dtypes of a weight matrix, a norm and a float input in the forward."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4, bias=False)
        self.norm = nn.Parameter(torch.ones(4))
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, angles):
        self.seen = {
            "matrix": self.proj.weight.dtype,
            "norm": self.norm.dtype,
            "input": angles.dtype,
        }
        return (self.proj(angles.to(self.proj.weight.dtype)) * self.norm).sum()


class SpyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([TypeSpy()])

    def forward(self, angles):
        return self.layers[0](angles)


def see_types(model_dtype: str):
    args = ld.DistributedArgs(model_dtype=model_dtype)
    ld.setup_torch_distributed(args)
    with torch.device("meta"):
        model = SpyModel()
    ld.parallelize_model(model, ld.get_device_mesh(args), None, args)
    model.to_empty(device="cpu")
    torch.nn.init.ones_(model.layers[0].proj.weight)
    torch.nn.init.ones_(model.layers[0].norm)
    model(torch.rand(2, 4)).backward()
    stored = {n: (p.dtype, p.grad.dtype, type(p)) for n, p in model.named_parameters()}
    return model.layers[0].seen, stored, torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def alone():
    """Run checks in a new process without a launcher."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply_async(be_alone).get(90)


def be_alone():
    for name in RANK_NAMES:
        os.environ.pop(name, None)
    return see_types("auto"), see_types("bf16"), see_signals()


def test_fp32_on_one_process_does_not_use_fsdp(alone):
    seen, stored, group = alone[0]
    assert not group
    assert set(seen.values()) == {torch.float32}
    assert stored["layers.0.proj.weight"][2] is nn.Parameter


def test_bf16_casts_only_weight_matrices_and_keeps_fp32_masters(alone):
    """The group of one process has an in-memory store, so it needs no port."""
    seen, stored, group = alone[1]
    assert group
    assert seen == {"matrix": torch.bfloat16, "norm": torch.float32, "input": torch.float32}
    fp32 = torch.float32
    assert stored["layers.0.proj.weight"] == (fp32, fp32, DTensor)
    assert stored["layers.0.norm"] == (fp32, fp32, nn.Parameter)


def see_signals():
    got = []
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})  # may be inherited
    ld.init_signal_handler(lambda signum, frame: got.append(signum))
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    return got, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signals_are_handled_and_a_second_sigterm_ends_the_process(alone):
    assert alone[2] == ([signal.SIGUSR2, signal.SIGTERM], True)


# ---- clipping


def check_clip(rank, world_size):
    """The norm over sharded and replicated gradients is the norm of the whole gradient."""
    args = ld.DistributedArgs(fsdp_type="full_shard", dp_replicate=2, model_dtype="fp32")
    mesh = ld.get_device_mesh(args)
    model = make_model()
    ld.parallelize_model(model, mesh, None, args, PLAN)
    tokens, target = make_batches(1, 1)[0, 0]
    ld.set_gradient_sync(model, False)
    with OpCounter() as accumulating:
        model(tokens, target).backward()
    assert reductions(accumulating) == 0, "only the last micro-batch communicates"
    ld.set_gradient_sync(model, True)
    model(tokens, target).backward()
    model.zero_grad()
    with OpCounter() as last:
        model(tokens[rank::2], target[rank::2]).backward()
    assert reductions(last) > 0
    with OpCounter() as bucket:
        ld.sync_replicated_grads(model, mesh)
    assert reductions(bucket) == 1, "one bucket for all replicated gradients"
    before = {n: whole(p.grad).clone() for n, p in model.named_parameters()}
    want = torch.cat([g.flatten() for g in before.values()]).norm()
    torch.testing.assert_close(ld.clip_grad_norm_(model, None), want)
    torch.testing.assert_close(ld.clip_grad_norm_(model, 0.0), want)
    torch.testing.assert_close(ld.clip_grad_norm_(model, 10 * want.item()), want)
    ld.clip_grad_norm_(model, want.item() / 4)
    after = {n: whole(p.grad) for n, p in model.named_parameters()}
    torch.testing.assert_close(after, {n: g / 4 for n, g in before.items()})

    # All ranks must skip a step with a NaN.
    assert ld.first_nonfinite(model) is None
    if rank == 1:
        model.output.weight.grad.to_local()[0] = float("nan")
    named = ld.first_nonfinite(model)
    assert named == ("output.weight.grad" if rank == 1 else None)
    return ld.clip_grad_norm_(model, 1.0).isnan().item()


def reductions(ops: OpCounter) -> int:
    return ops.counts["allreduce_"] + ops.counts["_reduce_scatter_base_"]


# ---- values across ranks


def check_reductions(rank, world_size):
    assert ld.dist_mean(float(rank)).item() == 0.5
    assert ld.dist_max(torch.tensor(rank)).item() == 1
    assert ld.dist_sum(2**53 - 1 if rank else 1).item() == 2**53, "counts are exact"
    assert ld.dist_mean_dict({"b": 1.0, "a": rank} if rank else {"a": rank, "b": 3.0}) == {
        "a": 0.5,
        "b": 2.0,
    }
    assert ld.agree_any(rank == 1) and not ld.agree_any(False)
    assert ld.gather_objects(rank) == [0, 1]
    assert ld.run_on_rank_0(lambda: ("from", rank)) == ("from", 0)

    def fail(error):
        if rank == 1:
            raise error
        return rank

    assert ld.run_together(lambda: fail(None) if rank == 0 else rank) == rank
    assert ld.run_and_average(lambda: (rank, 2.0 * rank)) == (rank, 1.0)
    with pytest.raises(UserError, match="^too big$"):
        ld.run_together(lambda: fail(UserError("too big")))
    full = OSError(errno.ENOSPC, "No space left")
    with pytest.raises(MachineFault, match="rank 1: No space left") as caught:
        ld.run_together(lambda: fail(full) if rank == 1 else rank)
    assert isinstance(caught.value, ld.RanksFailed)
    with pytest.raises(ld.RanksFailed, match="rank 1: ZeroDivisionError: division"):
        ld.run_together(lambda: 1 / (1 - rank))
    with pytest.raises(ld.RanksFailed, match="rank 0: ZeroDivisionError"):
        ld.run_on_rank_0(lambda: 1 / rank)
    return True


def check_meshes(rank, world_size):
    def dims(**kwargs):
        mesh = ld.get_device_mesh(ld.DistributedArgs(**kwargs))
        return mesh.mesh_dim_names, tuple(mesh.shape), ld.get_dp_rank_and_degree(mesh)

    full = {"fsdp_type": "full_shard"}
    assert dims(dp_replicate=2) == (("dp_replicate", "dp_shard"), (2, 1), (rank, 2))
    assert dims(dp_replicate=2, **full) == (("dp_replicate",), (2,), (rank, 2))
    assert dims(dp_shard=2, **full) == (("dp_replicate", "dp_shard"), (1, 2), (rank, 2))
    assert dims(tp_size=2, **full) == (("dp_replicate", "tp"), (1, 2), (0, 1))
    with pytest.raises(UserError, match="must be the number of processes, 2"):
        ld.get_device_mesh(ld.DistributedArgs(dp_replicate=3))
    return True


def test_one_process_needs_no_group():
    assert ld.get_device_mesh(ld.DistributedArgs()) is None
    assert ld.get_dp_rank_and_degree(None) == (0, 1)
    assert ld.dist_mean(3.0).item() == ld.dist_sum(3).item() == ld.dist_max(3.0).item() == 3
    assert ld.agree_any(True) and not ld.agree_any(False)
    assert ld.run_together(lambda: 5) == ld.run_on_rank_0(lambda: 5) == 5
    with pytest.raises(UserError):
        ld.run_together(lambda: ld.DistributedArgs(dp_shard=0))


@pytest.mark.parametrize("has_group", [False, True])
def test_one_process_agrees_without_its_device(has_group, monkeypatch):
    monkeypatch.setattr(ld, "get_device", lambda: torch.device("meta"))
    if has_group:  # as on a GPU, where FSDP casts the matrices
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert ld.agree_any(True) and not ld.agree_any(False)
        assert ld.run_and_average(lambda: ("rows", 3.0)) == ("rows", 3.0)
        assert ld.dist_sum(2.0**24 + 1).item() == 2**24 + 1
    finally:
        ld.destroy_process_group()


# ---- options


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"fsdp_type": "shard"}, "distributed.fsdp_type=shard"),
        ({"model_dtype": "bfloat16"}, "distributed.model_dtype=bfloat16"),
        ({"activation_checkpointing": "some"}, "distributed.activation_checkpointing=some"),
        ({"timeout_minutes": 0}, "distributed.timeout_minutes=0"),
        (
            {"selective_activation_checkpointing": True, "activation_checkpointing": "full"},
            "distributed.activation_checkpointing=full",
        ),
    ],
)
def test_invalid_options_are_reported(kwargs, message):
    with pytest.raises(UserError, match=message):
        ld.DistributedArgs(**kwargs)


def test_unused_options_are_reported():
    kwargs = {"compile_cache_size_limit": 9, "reshard_between_loops": True}
    assert len(list(unused_options(ld.DistributedArgs(**kwargs)))) == 2
    kwargs |= {"compile": True, "fsdp_type": "full_shard"}
    assert not list(unused_options(ld.DistributedArgs(**kwargs)))


def test_dp_replicate_is_set_from_the_number_of_processes():
    args = ld.DistributedArgs(fsdp_type="full_shard", dp_shard=2)
    assert ld.fit_to_world(args, 8).dp_replicate == 4
    assert args.dp_replicate == 1, "the input is unchanged"
    with pytest.raises(UserError, match="distributed.dp_shard=2 .*2 processes, not 5.*node 4"):
        ld.fit_to_world(args, 5)
    both = ld.DistributedArgs(fsdp_type="full_shard", dp_shard=2, tp_size=2)
    with pytest.raises(UserError, match="dp_shard=2 times distributed.tp_size=2 .*node 4"):
        ld.fit_to_world(both, 1)
    with pytest.raises(UserError, match="distributed.dp_shard=2 with distributed.fsdp_type"):
        ld.fit_to_world(ld.DistributedArgs(dp_shard=2), 2)


# ---- run_ranks


def test_run_ranks_fails_if_a_rank_hangs_or_fails():
    with pytest.raises(AssertionError, match=r"ranks \[0\] hang"):
        run_ranks(1, fail_on_rank_1, timeout=0.1)
    with pytest.raises(AssertionError, match=r"rank 1 failed:[^$]*ZeroDivisionError"):
        run_ranks(2, fail_on_rank_1)


def fail_on_rank_1(rank, world_size):
    if rank == 1:
        raise ZeroDivisionError
    time.sleep(600)
