"""A looped toy model on several ranks must train as it does in one process."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
import traceback
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy

from lingua import distributed as ld
from lingua.args import UserError
from lingua.errors import MachineFault
from lingua.optim import OptimArgs, build_optimizer
from tests.lingua.dist_utils import OpCounter, run_ranks
from tests.lingua.toy import LAYERS, LOOPS, PLAN, ROWS, make_batches, make_model, whole

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


def check_two_ranks(rank, world_size):
    check_reductions(rank, world_size)
    check_meshes(rank, world_size)
    return compare_with_one_process(rank, world_size, TWO_RANKS), check_clip(rank, world_size)


@pytest.fixture(scope="module")
def two_ranks():
    """Starting ranks takes longer than all that they do, so they do it in one go."""
    return run_ranks(2, check_two_ranks)


def test_a_temporary_folder_with_too_long_a_name_is_named(monkeypatch):
    def refuse():
        raise OSError("AF_UNIX path too long")

    before = multiprocessing.get_start_method(allow_none=True)
    monkeypatch.setattr(multiprocessing.forkserver, "ensure_running", refuse)
    try:
        with pytest.raises(UserError, match="TMPDIR=.*too long; set a shorter one"):
            ld.setup_torch_distributed(ld.DistributedArgs())
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks_train_as_one_process_does(two_ranks, case):
    assert [outcomes[case] for outcomes, _ in two_ranks] == [None, None]


def test_four_ranks_train_as_one_process_does():
    for outcomes in run_ranks(4, compare_with_one_process, FOUR_RANKS):
        assert outcomes == {"HSDP": None}


def test_one_ranks_nan_is_in_everyones_norm(two_ranks):
    assert [norm_is_nan for _, norm_is_nan in two_ranks] == [True, True]


# ---- precision

RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_PROCID")


class TypeSpy(nn.Module):
    """A matrix, a vector, and a float input, and the dtypes that the forward saw."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4, bias=False)
        self.norm = nn.Parameter(torch.ones(4))
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, angles):
        self.seen = {
            "matrix": self.proj.weight.dtype,
            "vector": self.norm.dtype,
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
    """What happens in a process of its own that no launcher started."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply_async(be_alone).get(90)


def be_alone():
    for name in RANK_NAMES:
        os.environ.pop(name, None)
    return see_types("auto"), see_types("bf16"), see_signals()


def test_one_process_in_fp32_is_not_wrapped(alone):
    seen, stored, group = alone[0]
    assert not group
    assert set(seen.values()) == {torch.float32}
    assert stored["layers.0.proj.weight"][2] is nn.Parameter


def test_bf16_casts_matrices_alone_and_keeps_masters_in_fp32(alone):
    """Also: one process in bf16 needs no port, as its group meets in memory."""
    seen, stored, group = alone[1]
    assert group
    assert seen == {"matrix": torch.bfloat16, "vector": torch.float32, "input": torch.float32}
    fp32 = torch.float32
    assert stored["layers.0.proj.weight"] == (fp32, fp32, DTensor)
    assert stored["layers.0.norm"] == (fp32, fp32, nn.Parameter)


def see_signals():
    got = []
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})  # as inherited
    ld.init_signal_handler(lambda signum, frame: got.append(signum))
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    return got, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signals_are_handled_and_a_second_sigterm_ends_the_process(alone):
    assert alone[2] == ([signal.SIGUSR2, signal.SIGTERM], True)


# ---- clipping


def check_clip(rank, world_size):
    """Matrices sharded, vectors whole: the norm is that of the whole gradient, on every rank."""
    args = ld.DistributedArgs(fsdp_type="full_shard", dp_replicate=2, model_dtype="fp32")
    mesh = ld.get_device_mesh(args)
    model = make_model()
    ld.parallelize_model(model, mesh, None, args, PLAN)
    tokens, target = make_batches(1, 1)[0, 0]
    ld.set_gradient_sync(model, False)
    with OpCounter() as accumulating:
        model(tokens, target).backward()
    assert reductions(accumulating) == 0, "a micro-batch before the last one only adds up"
    ld.set_gradient_sync(model, True)
    model(tokens, target).backward()
    model.zero_grad()
    with OpCounter() as last:
        model(tokens[rank::2], target[rank::2]).backward()
    assert reductions(last) > 0
    with OpCounter() as bucket:
        ld.sync_replicated_grads(model, mesh)
    assert reductions(bucket) == 1, "one bucket for all vectors"
    before = {n: whole(p.grad).clone() for n, p in model.named_parameters()}
    want = torch.cat([g.flatten() for g in before.values()]).norm()
    torch.testing.assert_close(ld.clip_grad_norm_(model, None), want)
    torch.testing.assert_close(ld.clip_grad_norm_(model, 0.0), want)
    torch.testing.assert_close(ld.clip_grad_norm_(model, 10 * want.item()), want)
    ld.clip_grad_norm_(model, want.item() / 4)
    after = {n: whole(p.grad) for n, p in model.named_parameters()}
    torch.testing.assert_close(after, {n: g / 4 for n, g in before.items()})

    # one rank's NaN is everyone's: all skip the step, or none
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
    with pytest.raises(UserError, match="^too big$"):
        ld.run_together(lambda: fail(UserError("too big")))
    full = OSError(errno.ENOSPC, "No space left")
    with pytest.raises(MachineFault, match=r"rank 1: OSError: .*No space left") as caught:
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


# ---- activation checkpointing and compile


@pytest.mark.parametrize("mode", ["none", "selective", "full", "loop"])
def test_what_the_backward_computes_again(mode):
    """Counts matmuls and tanh: selective keeps the former, full nothing; loop is the app's."""
    model = make_model()
    ld.parallelize_model(model, None, None, args_of(mode), PLAN)
    tokens, target = make_batches(1, 1)[0, 0]
    with OpCounter() as ops:
        loss = model(tokens, target)
        forward = ops.counts.copy()
        loss.backward()
    again = {name: ops.counts[name] - forward[name] for name in ("tanh", "addmm")}
    calls = LAYERS * LOOPS
    assert forward["tanh"] == forward["addmm"] == calls
    assert (
        again
        == {
            "none": {"tanh": 0, "addmm": 0},
            "loop": {"tanh": 0, "addmm": 0},
            "selective": {"tanh": calls, "addmm": 0},
            "full": {"tanh": calls, "addmm": calls},
        }[mode]
    )


def args_of(mode: str) -> ld.DistributedArgs:
    return ld.DistributedArgs(activation_checkpointing=mode, model_dtype="fp32")


def test_an_apps_own_ops_are_kept_beside_the_defaults():
    policy = ld.get_default_policy({torch.ops.aten.tanh.default})
    keep = CheckpointPolicy.MUST_SAVE
    assert policy(None, torch.ops.aten.tanh.default) is keep
    assert policy(None, torch.ops.aten.mm.default) is keep
    assert policy(None, torch.ops.aten.exp.default) is not keep


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_blocks_compile_whole_once_for_all_layers_and_loops(monkeypatch, mode):
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import in every rank

    counter = CompileCounterWithBackend("aot_eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", partial(real, backend=counter, fullgraph=True))
    args = ld.DistributedArgs(model_dtype="fp32", compile=True, activation_checkpointing=mode)
    torch.testing.assert_close(train(None, args), train(None, None), **TOLERANCE)
    assert counter.frame_count == 1


# ---- checks of a model


def test_suspicious_values_are_named():
    model = make_model()
    with torch.no_grad():
        model.rho.zero_()
    assert ld.check_model_value_range(model, zero_init=("rho",)) == []
    with torch.no_grad():
        model.output.weight[3, 2] = float("nan")
        model.layers[0].w1.weight[1, 1] = 5e3
        model.layers[1].w2.weight.zero_()
    told = ld.check_model_value_range(model, range=1e3)
    assert [t.split()[0] for t in told] == [
        "rho",
        "layers.0.w1.weight",
        "layers.1.w2.weight",
        "output.weight",
    ]
    assert ld.first_nonfinite(model) == "output.weight"


def test_modules_by_path():
    model = make_model()
    new = nn.Linear(1, 1)
    ld.set_module(model, "layers.1.w1", new)
    ld.set_module(model, "output", new)
    assert ld.get_module(model, "layers.1.w1") is new and model.output is new


# ---- options


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"fsdp_type": "shard"}, "distributed.fsdp_type=shard"),
        ({"model_dtype": "bfloat16"}, "distributed.model_dtype=bfloat16"),
        ({"activation_checkpointing": "some"}, "distributed.activation_checkpointing=some"),
        ({"float8_recipe": "rowwise"}, "float8 is not implemented"),
        ({"timeout_minutes": 0}, "distributed.timeout_minutes=0"),
        ({"timeout_minutes": 1e30}, "distributed.timeout_minutes=1e[+]30"),
        (
            {"selective_activation_checkpointing": True, "activation_checkpointing": "full"},
            "contradicts distributed.activation_checkpointing=full",
        ),
    ],
)
def test_bad_options_are_named(kwargs, message):
    with pytest.raises(UserError, match=message):
        ld.DistributedArgs(**kwargs)


def test_dp_replicate_is_fitted_to_the_processes():
    args = ld.DistributedArgs(fsdp_type="full_shard", dp_shard=2)
    assert ld.fit_to_world(args, 8).dp_replicate == 4
    assert args.dp_replicate == 1, "the input is not edited"
    with pytest.raises(UserError, match="does not divide the 3 processes"):
        ld.fit_to_world(args, 3)
    with pytest.raises(UserError, match="distributed.dp_shard=2 with distributed.fsdp_type"):
        ld.fit_to_world(ld.DistributedArgs(dp_shard=2), 2)


def test_tensor_parallel_without_a_plan_is_refused():
    with pytest.raises(UserError, match="distributed.tp_size=2"):
        ld.parallelize_model(make_model(), None, None, ld.DistributedArgs(tp_size=2), PLAN)


# ---- the process


def test_the_users_environment_wins(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "TRACE")
    monkeypatch.delenv("NCCL_IB_TIMEOUT", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    ld.setup_env(ld.EnvironmentArgs(MKL_NUM_THREADS=None))
    assert os.environ["NCCL_DEBUG"] == "TRACE" and os.environ["NCCL_IB_TIMEOUT"] == "22"
    assert "MKL_NUM_THREADS" not in os.environ


def ranks():
    return ld.get_global_rank(), ld.get_local_rank(), ld.get_world_size()


def test_ranks_of_torchrun_srun_and_a_single_process(monkeypatch):
    for name in RANK_NAMES:
        monkeypatch.delenv(name, raising=False)
    assert ranks() == (0, 0, 1) and ld.get_is_master()
    slurm = {"JOB_ID": "7", "PROCID": "5", "LOCALID": "1", "NTASKS": "8"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert ranks() == (5, 1, 8) and ld.get_is_slurm_job() and not ld.get_is_master()
    for name, value in {"RANK": "3", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert ranks() == (3, 2, 4) and not ld.get_is_slurm_job()


def test_a_job_submitted_from_inside_does_not_look_like_this_one(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    with pytest.raises(KeyError), ld.clean_env():
        assert not {"SLURM_JOB_ID", "RANK", "WANDB_RUN_ID"} & os.environ.keys()
        assert os.environ["WANDB_API_KEY"] == "secret"
        raise KeyError
    assert os.environ["SLURM_JOB_ID"] == "7" and os.environ["RANK"] == "3"


def test_requeue_asks_scontrol_once_and_only_inside_slurm(monkeypatch, tmp_path):
    for name in RANK_NAMES:
        monkeypatch.delenv(name, raising=False)
    assert not ld.requeue_slurm_job()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not ld.requeue_slurm_job(), "no scontrol here: told, not raised"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    assert ld.requeue_slurm_job()
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert not ld.requeue_slurm_job()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_ranks_that_hang_or_fail_fail_a_test():
    """The helper's own promise."""
    with pytest.raises(AssertionError, match=r"ranks \[0\] said nothing for 0.1 s"):
        run_ranks(1, fail_on_rank_1, timeout=0.1)
    with pytest.raises(AssertionError, match=r"rank 1 failed:[^$]*ZeroDivisionError"):
        run_ranks(2, fail_on_rank_1)


def fail_on_rank_1(rank, world_size):
    if rank == 1:
        raise ZeroDivisionError
    time.sleep(600)
