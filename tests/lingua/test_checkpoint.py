"""Checkpoints: exact resume, survival of kills and damage, and what is deleted."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import lingua.checkpoint_folder
import lingua.checkpoint_save
import lingua.tensor_save
import lingua.tensor_store
from lingua import distributed as ld
from lingua.args import UserError
from lingua.checkpoint import (
    CheckpointArgs,
    CheckpointManager,
    SaveEvery,
    consolidate_checkpoints,
    load_from_checkpoint,
)
from lingua.checkpoint_folder import find_problem
from lingua.optim import OptimArgs, build_optimizer
from lingua.weight_file import load_initial_weights, write_weights
from tests.lingua.dist_utils import run_ranks
from tests.lingua.toy import PLAN, ROWS, Looped, make_batches, make_model, whole

STEPS, STOP = 6, 3
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
    """Train with noise from every generator, so that a resume must restore them all."""
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
    moments = lingua.tensor_store.optimizer_state(model, optimizer)
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


def check_resume(rank, world_size, folder, kwargs, async_save=False):
    """Train STEPS; train STOP, save, come back in a fresh model, go on: all must be equal."""
    args = kwargs and ld.DistributedArgs(model_dtype="fp32", **kwargs)
    mesh = ld.get_device_mesh(args) if args else None
    seed_all(rank)
    model, optimizer, state = build(mesh, args)
    seed_all(rank)
    manager = manager_at(folder, async_save=async_save)
    log = train(STOP, model, optimizer, state, mesh)
    with torch.no_grad():  # a validation pass leaves FSDP's weights gathered
        model(*make_batches(1, 1)[0, 0])
    assert manager.save(model, optimizer, state, CONFIG, mesh)
    saved = tensors(model, optimizer)
    log += train(STEPS, model, optimizer, state, mesh)
    want = tensors(model, optimizer)
    manager.finish()

    seed_all(99)
    model, optimizer, state = build(mesh, args)
    loaded = manager.load(model, optimizer, state, mesh, config=CONFIG)
    assert loaded is not None and loaded.step == state.step == STOP and not loaded.differences
    assert_same_bits(tensors(model, optimizer), saved)
    again = train(STEPS, model, optimizer, state, mesh)
    assert again == log[STOP:], "losses, norms and learning rates to the last bit"
    assert_same_bits(tensors(model, optimizer), want)
    return saved


def test_resume_is_exact_in_one_process(tmp_path):
    check_resume(0, 1, tmp_path, None)


FULL_SHARD = {"fsdp_type": "full_shard", "dp_replicate": 2}
NO_SHARD = {"dp_replicate": 2}


def check_two_ranks(rank, world_size, folder):
    check_resume(rank, world_size, folder / "no_shard", NO_SHARD)
    saved = check_resume(rank, world_size, folder / "full_shard", FULL_SHARD)
    check_other_world_size(folder / "one")
    check_resume(rank, world_size, folder / "async", FULL_SHARD, async_save=True)
    check_failure_is_everyones(rank, folder / "full_shard")
    return saved


def check_other_world_size(folder):
    """Written by one process, and gone on with by two."""
    args = ld.DistributedArgs(model_dtype="fp32", **FULL_SHARD)
    mesh = ld.get_device_mesh(args)
    model, optimizer, state = build(mesh, args)
    loaded = manager_at(folder).load(model, optimizer, state, mesh)
    assert loaded is not None and loaded.step == state.step == STOP and state.from_ranks == 1
    torch.save(tensors(model, optimizer), folder / f"on_two_{torch.distributed.get_rank()}.pt")


def check_failure_is_everyones(rank, folder):
    """A disk that fills up under one rank: all ranks raise, and the older checkpoint is there."""
    args = ld.DistributedArgs(model_dtype="fp32", **FULL_SHARD)
    mesh = ld.get_device_mesh(args)
    model, optimizer, state = build(mesh, args)
    manager = manager_at(folder)
    train(STOP + 1, model, optimizer, state, mesh)
    real = lingua.checkpoint_folder.write_atomic

    def full_disk(path, data):
        if rank == 1:
            raise OSError("no space left on device")
        real(path, data)

    lingua.checkpoint_folder.write_atomic = full_disk
    try:
        manager.save(model, optimizer, state, CONFIG, mesh)
    except ld.RanksFailed as error:
        assert "rank 1: OSError: no space left" in str(error)
    else:
        raise AssertionError("a failed save went unnoticed")
    finally:
        lingua.checkpoint_folder.write_atomic = real
    loaded = manager.load(model, optimizer, state, mesh)
    assert loaded is not None and loaded.step == STOP


def test_two_ranks_resume_exactly_and_fail_together(tmp_path):
    model, optimizer, state = build()
    train(STOP, model, optimizer, state)
    manager_at(tmp_path / "one").save(model, optimizer, state, CONFIG)
    want = tensors(model, optimizer)

    saved_by_two = run_ranks(2, check_two_ranks, tmp_path)[0]

    assert_same_bits(torch.load(tmp_path / "one" / "on_two_1.pt"), want)
    model, optimizer, state = build()
    full_shard = manager_at(tmp_path / "full_shard")
    load_from_checkpoint(full_shard.get_last_step_path(), model, optimizer)
    assert_same_bits(tensors(model, optimizer), saved_by_two)
    assert full_shard.load(model, optimizer, state) is not None
    assert state.from_ranks == 2 and state.step == STOP


# ---- kills and damage


@pytest.fixture
def run(tmp_path):
    """A run in one process with checkpoints of steps 1 and 2."""
    model, optimizer, state = build()
    manager = manager_at(tmp_path / "checkpoints")
    for step in (1, 2):
        train(step, model, optimizer, state)
        manager.save(model, optimizer, state, CONFIG)
    return manager, model, optimizer, state


def die_at_call(n, model, optimizer, state, folder, rule, async_save):
    """Save step 3 over step 2's rule, and SIGKILL this process at the n-th touch of the disk."""
    calls = 0

    def mortal(real):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return wrapper

    for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir"):
        setattr(os, name, mortal(getattr(os, name)))
    args = CheckpointArgs(path=str(folder), dump=rule, async_save=async_save)
    with CheckpointManager(args) as manager:
        manager.save(model, optimizer, state, CONFIG)


@pytest.mark.parametrize(
    "again, async_save",
    [(False, False), (True, False), (False, True)],
    ids=["next step", "same step", "in the background"],
)
def test_a_kill_at_any_moment_of_save_leaves_a_checkpoint(run, tmp_path, again, async_save):
    manager, model, optimizer, state = run
    shutil.copytree(manager.path, tmp_path / "before")
    if not again:
        train(3, model, optimizer, state)
    fork = multiprocessing.get_context("fork")
    for n in range(1, 100):
        shutil.rmtree(manager.path)
        shutil.copytree(tmp_path / "before", manager.path)
        rule = SaveEvery(every=1, keep=1)
        args = (n, model, optimizer, state, manager.path, rule, async_save)
        child = fork.Process(target=die_at_call, args=args)
        child.start()
        child.join(30)
        assert child.exitcode in (0, -signal.SIGKILL)

        fresh = build()
        loaded = manager.load(*fresh)
        assert loaded is not None and loaded.step in (2, state.step), f"lost by a kill at call {n}"
        assert not any(find_problem(p) for p in manager.existing_saves)
        names = {p.name for p in manager.path.iterdir()}
        assert all(len(name) == 10 for name in names), f"leftovers after a kill at {n}: {names}"
        if child.exitcode == 0:
            break
    assert child.exitcode == 0 and n > 10, "the kills must have covered the whole save"
    assert names == {f"{state.step:010d}"}


def truncate_tensors(folder):
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])


def scramble_tensors(folder):
    file = folder / "__0_0.distcp"
    file.write_bytes(bytes(len(file.read_bytes())))


def edit_train_state(folder):
    file = folder / "train_state_00000.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 7'))


def drop_config(folder):
    (folder / "params.json").unlink()


def drop_manifest(folder):
    (folder / "manifest.json").unlink()


def flip_a_bit(folder):
    """Of a weight: such a file still loads."""
    file, weight = folder / "__0_0.distcp", "model.output.weight"
    metadata = FileSystemReader(folder).read_metadata()
    (place,) = [p for key, p in metadata.storage_data.items() if key.fqn == weight]
    data = bytearray(file.read_bytes())
    stored = torch.load(io.BytesIO(data[place.offset : place.offset + place.length]))
    at = data.find(stored.numpy().tobytes(), place.offset)
    assert at > 0
    data[at] ^= 1
    file.write_bytes(data)


DAMAGES = [
    truncate_tensors,
    scramble_tensors,
    flip_a_bit,
    edit_train_state,
    drop_config,
    drop_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(run, damage):
    manager, model, optimizer, state = run
    damage(manager.existing_saves[-1])
    model, optimizer, state = build()
    want, first_optimizer, _ = build()
    load_from_checkpoint(manager.existing_saves[0], want, first_optimizer)

    loaded = manager.load(model, optimizer, state)

    assert loaded is not None and loaded.step == state.step == 1
    assert_same_bits(tensors(model, optimizer), tensors(want, first_optimizer))


def test_a_damaged_checkpoint_does_not_crowd_out_those_that_can_be_read(run):
    manager, model, optimizer, state = run
    train(4, model, optimizer, state)
    manager.save(model, optimizer, state, CONFIG)
    truncate_tensors(manager.existing_saves[-1])
    fresh = build()
    loaded = manager.load(*fresh)
    assert loaded is not None and loaded.step == 2
    manager.args.dump = SaveEvery(every=1, keep=1)
    train(3, *fresh)
    manager.save(*fresh, CONFIG)
    assert [int(p.name) for p in manager.existing_saves] == [3, 4]
    loaded = manager.load(*build())
    assert loaded is not None and loaded.step == 3


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(run):
    manager, *fresh = run
    for folder in manager.existing_saves:
        truncate_tensors(folder)
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        manager.load(*fresh)


# ---- saving in the background


@pytest.fixture
def held_disk(monkeypatch):
    """Tensors are written only after `.set()`."""
    gate = threading.Event()
    real = lingua.tensor_save.FileSystemWriter.write_data

    def write_data(self, plan, planner):
        assert gate.wait(30)
        return real(self, plan, planner)

    monkeypatch.setattr(lingua.tensor_save.FileSystemWriter, "write_data", write_data)
    yield gate
    gate.set()


def test_training_goes_on_while_a_save_is_written(tmp_path, held_disk):
    manager = manager_at(tmp_path, async_save=True)
    model, optimizer, state = build()
    train(2, model, optimizer, state)
    want, state_then = tensors(model, optimizer), state.state_dict()
    manager.save(model, optimizer, state, CONFIG)
    train(4, model, optimizer, state)  # in place: the save must hold copies
    manager.poll()
    assert manager.existing_saves == [], "published before it was written"

    held_disk.set()
    manager.finish()
    assert [p.name for p in manager.existing_saves] == ["0000000002"]
    assert not any(p.suffix for p in tmp_path.iterdir())
    fresh = build()
    assert manager.load(*fresh) is not None
    assert fresh[2].state_dict() == state_then
    assert_same_bits(tensors(*fresh[:2]), want)


def test_a_poll_publishes_what_is_written_and_a_save_waits_for_the_one_before(tmp_path):
    manager = manager_at(tmp_path, async_save=True)
    model, optimizer, state = build()
    for step in (1, 2):
        train(step, model, optimizer, state)
        manager.save(model, optimizer, state, CONFIG)
    assert [p.name for p in manager.existing_saves] == ["0000000001"]
    assert manager._save is not None
    manager._save.wait()
    manager.poll()
    assert [int(p.name) for p in manager.existing_saves] == [1, 2]


def test_a_background_save_that_fails_is_told_and_leaves_the_one_before(run, monkeypatch):
    manager, model, optimizer, state = run
    manager.args.async_save = True

    def full_disk(self, plan, planner):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lingua.tensor_save.FileSystemWriter, "write_data", full_disk)
    train(3, model, optimizer, state)
    manager.save(model, optimizer, state, CONFIG)
    with pytest.raises(ld.RanksFailed, match=r"could not write .*GiB free.*No space left"):
        manager.finish()
    assert sorted(p.name for p in manager.path.iterdir()) == ["0000000001", "0000000002"]
    loaded = manager.load(*build())
    assert loaded is not None and loaded.step == 2
    assert sorted(p.name for p in manager.path.iterdir()) == ["0000000001", "0000000002"]


@pytest.mark.parametrize("error", [None, FloatingPointError, KeyError])
def test_leaving_publishes_the_save_under_way_and_an_error_of_one_rank_drops_it(tmp_path, error):
    model, optimizer, state = build()
    train(1, model, optimizer, state)
    with suppress(FloatingPointError, KeyError), manager_at(tmp_path, async_save=True) as manager:
        manager.save(model, optimizer, state, CONFIG)
        if error:
            raise error
    is_shared = error in (None, FloatingPointError)  # a NaN is in every rank's gradient norm
    assert len(manager.existing_saves) == is_shared
    assert (manager.load(*build()) is not None) == is_shared
    assert not any(p.suffix for p in tmp_path.iterdir())


def test_a_save_that_was_not_written_as_it_should_be_replaces_nothing(run, monkeypatch):
    manager, model, optimizer, state = run
    manager.args.dump = SaveEvery(every=1, keep=1)
    real = lingua.checkpoint_save.write_train_state

    def lose_bytes(folder, name, text):
        files = real(folder, name, text)
        truncate_tensors(folder)
        return files

    monkeypatch.setattr(lingua.checkpoint_save, "write_train_state", lose_bytes)
    train(3, model, optimizer, state)
    with pytest.raises(ld.RanksFailed, match=r"__0_0.distcp is not what was written"):
        manager.save(model, optimizer, state, CONFIG)
    assert [int(p.name) for p in manager.existing_saves] == [1, 2]


# ---- what is loaded


def test_no_checkpoint_is_no_error(tmp_path):
    assert manager_at(tmp_path).load(*build()) is None


def test_changes_between_saved_and_given_config_are_told(run):
    manager, *_ = run
    now = {"optim": {"lr": 0.01, "clip": 1.0}, "steps": STEPS}
    loaded = manager.load(*build(), config=now)
    assert loaded is not None
    assert len(loaded.differences) == 1
    assert loaded.differences[0].startswith("optim.lr: 0.05 -> 0.01")


def test_a_new_run_continues_from_init_where_asked(run, tmp_path):
    manager, *_ = run
    args = {"init_ckpt_path": str(manager.existing_saves[0]), "continue_training_from_init": True}
    model, optimizer, state = build()
    loaded = manager_at(tmp_path / "new", **args).load(model, optimizer, state)
    assert loaded is not None and loaded.step == state.step == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 2 / 4)


def test_a_checkpoint_of_another_shape_is_refused_by_name(run):
    manager, *_ = run
    model, optimizer, state = build()
    model.rho = nn.Parameter(torch.zeros(7, 6))
    with pytest.raises(UserError, match=r"rho is \(3, 6\), the model has \(7, 6\)"):
        load_from_checkpoint(manager.existing_saves[-1], model)
    with pytest.raises(UserError, match="is no checkpoint folder"):
        load_from_checkpoint(manager.path, model)


def test_a_checkpoint_that_is_all_model_loads_with_an_empty_key(tmp_path):
    dcp.save(make_model().state_dict(), checkpoint_id=tmp_path, no_dist=True)
    model = Looped()
    load_from_checkpoint(tmp_path, model, model_key="")
    assert_same_bits(dict(model.named_parameters()), dict(make_model().named_parameters()))


def test_parameters_without_optimizer_state_stay_so(tmp_path):
    model, optimizer, state = build()
    model.rho.requires_grad_(False)
    train(1, model, optimizer, state)
    manager = manager_at(tmp_path)
    manager.save(model, optimizer, state, CONFIG)
    fresh_model, fresh, _ = build()
    load_from_checkpoint(manager.existing_saves[-1], fresh_model, fresh)
    assert not fresh.state[fresh_model.rho] and fresh.state[fresh_model.output.weight]


# ---- what is deleted


def save_steps(manager, steps):
    model, optimizer, state = build()
    for state.step in steps:
        manager.save(model, None, state, CONFIG)


@pytest.mark.parametrize(
    "dump, eval, want",
    [
        ((2, 0), (3, 0), [1, 2, 3, 4, 6, 7]),
        ((2, 2), (3, 1), [4, 6, 7]),
        ((2, 1), (3, 0), [3, 6, 7]),
        ((0, 1), (0, 1), [7]),
        ((1, 3), (5, 1), [4, 6, 7]),
    ],
)
def test_keep_rules(tmp_path, dump, eval, want):
    manager = manager_at(tmp_path, dump=SaveEvery(*dump), eval=SaveEvery(*eval))
    save_steps(manager, [1, 2, 3, 4, 6, 7])
    assert [int(p.name) for p in manager.existing_saves] == want


def test_what_others_wrote_is_never_deleted(tmp_path):
    foreign = ["0000000001_backup", "00000000001", "0000000003", "0000000001.old", "notes"]
    foreign += ["0000000008.tmp", "0000000009.replaced", "0000000010"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    (tmp_path / "0000000002.tmp").mkdir()
    (tmp_path / "0000000002.tmp" / "__0_0.distcp").write_text("half")
    manager = manager_at(tmp_path, dump=SaveEvery(1, keep=1), eval=SaveEvery(1, keep=1))
    save_steps(manager, [4])
    consolidate_checkpoints(tmp_path / "0000000004")
    save_steps(manager, [5])
    (tmp_path / "0000000005" / "my_plots").mkdir()
    save_steps(manager, [6])
    want = {*foreign, "0000000005", "0000000006"}
    assert {p.name for p in tmp_path.iterdir()} == want
    assert all((tmp_path / name / "precious").exists() for name in foreign)


def test_a_save_does_not_make_room_for_itself_among_the_files_of_others(run):
    manager, model, optimizer, state = run
    (manager.existing_saves[-1] / "my_plots").mkdir()
    manager.save(model, optimizer, state, CONFIG)  # the same step again
    names = ["0000000001", "0000000002", "0000000002.replaced"]
    assert sorted(p.name for p in manager.path.iterdir()) == names
    assert (manager.path / names[-1] / "my_plots").is_dir()

    (manager.path / "0000000003.tmp").mkdir()
    (manager.path / "0000000003.tmp" / "precious").write_text("mine")
    train(3, model, optimizer, state)
    with pytest.raises(UserError, match="0000000003.tmp is in the way of a checkpoint"):
        manager.save(model, optimizer, state, CONFIG)
    assert (manager.path / "0000000003.tmp" / "precious").read_text() == "mine"


@pytest.mark.parametrize("async_save", [False, True])
def test_a_real_limit_on_the_disk_costs_nothing_that_was_there(run, async_save):
    manager, model, optimizer, state = run
    manager.args.async_save = async_save
    train(3, model, optimizer, state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RuntimeError, match="could not write .*GiB free.*are whole"):
            manager.save(model, optimizer, state, CONFIG)
            manager.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in manager.path.iterdir()) == ["0000000001", "0000000002"]
    manager.save(model, optimizer, state, CONFIG)
    manager.finish()
    assert [int(p.name) for p in manager.existing_saves] == [1, 2, 3]


# ---- one file for inference


def test_consolidated_holds_the_weights_alone(run, tmp_path):
    manager, model, *_ = run
    folder = manager.existing_saves[-1]
    (folder / "consolidated").mkdir()  # as a killed consolidation leaves it
    (folder / "consolidated" / "params.json").write_text("half")

    consolidated = consolidate_checkpoints(folder)

    assert {p.name for p in consolidated.iterdir()} == {"consolidated.pth", "params.json"}
    assert json.loads((consolidated / "params.json").read_text()) == CONFIG
    content = torch.load(consolidated / "consolidated.pth", weights_only=True)
    assert content.keys() == {"model"}
    assert_same_bits(content["model"], dict(model.state_dict()))

    dcp_to_torch_save(folder, tmp_path / "all.pth")
    everything = torch.load(tmp_path / "all.pth")
    assert_same_bits(everything["model"], dict(model.state_dict()))
    assert everything["optim"]["state"].keys() == dict(model.named_parameters()).keys()


def test_what_is_half_of_a_consolidation_is_made_anew(run):
    manager, model, *_ = run
    folder = manager.existing_saves[-1]
    consolidated = consolidate_checkpoints(folder)
    (consolidated / "params.json").unlink()
    (consolidated / "consolidated.pth").write_bytes(b"of another program")
    consolidate_checkpoints(folder)
    content = torch.load(consolidated / "consolidated.pth", weights_only=True)
    assert_same_bits(content["model"], dict(model.state_dict()))
    assert json.loads((consolidated / "params.json").read_text()) == CONFIG


def test_a_consolidation_that_fails_leaves_no_file(run, monkeypatch):
    folder = run[0].existing_saves[-1]

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lingua.tensor_store.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        consolidate_checkpoints(folder)
    assert [p.name for p in (folder / "consolidated").iterdir()] == ["params.json"]


def test_consolidating_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint folder: it has no .metadata"):
        consolidate_checkpoints(tmp_path)


# ---- a run that starts from a file of weights

FILES = pytest.mark.parametrize("name", ["consolidated.pth", "model.safetensors"])


def weights_of(seed):
    state = make_model().state_dict()
    torch.manual_seed(seed)
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


def check_initial_weights(rank, world_size, file):
    args = ld.DistributedArgs(model_dtype="fp32", fsdp_type="full_shard", dp_shard=world_size)
    mesh = ld.get_device_mesh(args)
    model, *_ = build(mesh, args)
    load_initial_weights(str(file), model)
    assert_same_bits({n: whole(p).detach() for n, p in model.named_parameters()}, weights_of(1))


@FILES
def test_a_sharded_model_starts_from_one_file(name, tmp_path):
    pytest.importorskip("safetensors")
    write_weights(tmp_path / name, weights_of(1), metadata={})
    run_ranks(2, check_initial_weights, tmp_path / name)


@FILES
def test_a_model_starts_from_a_file_or_its_folder(name, tmp_path):
    pytest.importorskip("safetensors")
    write_weights(tmp_path / name, weights_of(1), metadata={})
    for path in (tmp_path, tmp_path / name):
        model, *_ = build()
        load_initial_weights(str(path), model)
        assert_same_bits(dict(model.state_dict()), weights_of(1))


def test_a_file_of_another_model_is_refused(tmp_path):
    weights = weights_of(1)
    del weights["rho"]
    write_weights(tmp_path / "consolidated.pth", weights, metadata={})
    model, *_ = build()
    with pytest.raises(UserError, match="consolidated.pth does not fit the model: rho is not"):
        load_initial_weights(str(tmp_path), model)
    with pytest.raises(UserError, match="checkpoint.init_ckpt_path=nowhere: no checkpoint there"):
        load_initial_weights("nowhere", model)


def test_a_model_that_changed_is_refused_with_what_changed(tmp_path):
    """Also one that lost layers: going on without them would throw away what they learned."""
    model, optimizer, state = build()
    manager = manager_at(tmp_path)
    saved = {"model": {"n_layers": 2}, "optim": {"lr": 0.05}}
    manager.save(model, optimizer, state, saved)

    smaller = make_model()
    smaller.layers = smaller.layers[:1]
    smaller_optimizer, _ = build_optimizer(smaller, OptimArgs(lr=0.05, warmup=4), STEPS)
    now = {"model": {"n_layers": 1}, "optim": {"lr": 0.1}}
    with pytest.raises(UserError, match="layers.1.norm.weight.*no such tensor") as caught:
        manager.load(smaller, smaller_optimizer, state, config=now)
    assert "model.n_layers: 2 -> 1. Set it back" in str(caught.value)
    assert "optim.lr" not in str(caught.value)
    load_from_checkpoint(manager.existing_saves[-1], smaller)  # weights alone may be fewer
