"""Checkpoints: exact resume, kills, damage, and mismatches."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import shutil
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

import lingua.checkpointing.folder
from lingua import distributed as ld
from lingua.checkpoint import CheckpointArgs, CheckpointManager, SaveEvery, load_from_checkpoint
from lingua.checkpointing.folder import find_problem
from lingua.errors import UserError
from lingua.optim import OptimArgs, build_optimizer
from tests.lingua.checkpointing.checkpoint_runs import (
    CONFIG,
    N_FILES,
    STEPS,
    STOP,
    assert_same_bits,
    build,
    manager_at,
    seed_all,
    tensors,
    train,
    truncate_tensors,
    write_in_threads,
)
from tests.lingua.dist_utils import run_ranks
from tests.lingua.toy import Looped, make_batches, make_model


def check_resume(rank, world_size, folder, kwargs, async_save=False):
    """Compare STEPS of training with STOP steps, a save, and the rest in a fresh model."""
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
    assert again == log[STOP:], "losses, norms and learning rates must be bit-exact"
    assert_same_bits(tensors(model, optimizer), want)
    return saved


@pytest.mark.parametrize("in_threads", [False, True])
def test_resume_is_exact_in_one_process(tmp_path, monkeypatch, in_threads):
    if in_threads:
        write_in_threads(monkeypatch)
    check_resume(0, 1, tmp_path, None)
    assert len(list(tmp_path.glob("*/*.distcp"))) == (N_FILES if in_threads else 1)


FULL_SHARD = {"fsdp_type": "full_shard", "dp_replicate": 2}
NO_SHARD = {"dp_replicate": 2}


def check_two_ranks(rank, world_size, folder):
    check_resume(rank, world_size, folder / "no_shard", NO_SHARD)
    with pytest.MonkeyPatch.context() as patch:
        write_in_threads(patch)
        saved = check_resume(rank, world_size, folder / "full_shard", FULL_SHARD)
    check_other_world_size(folder / "one")
    check_resume(rank, world_size, folder / "async", FULL_SHARD, async_save=True)
    check_failure_on_one_rank(rank, folder / "full_shard")
    return saved


def check_other_world_size(folder):
    """Load on two ranks what one process has saved."""
    args = ld.DistributedArgs(model_dtype="fp32", **FULL_SHARD)
    mesh = ld.get_device_mesh(args)
    model, optimizer, state = build(mesh, args)
    loaded = manager_at(folder).load(model, optimizer, state, mesh)
    assert loaded is not None and loaded.step == state.step == STOP and state.from_ranks == 1
    torch.save(tensors(model, optimizer), folder / f"on_two_{torch.distributed.get_rank()}.pt")


def check_failure_on_one_rank(rank, folder):
    """A full disk on one rank raises on all ranks and keeps the older checkpoint."""
    args = ld.DistributedArgs(model_dtype="fp32", **FULL_SHARD)
    mesh = ld.get_device_mesh(args)
    model, optimizer, state = build(mesh, args)
    manager = manager_at(folder)
    train(STOP + 1, model, optimizer, state, mesh)
    real = lingua.checkpointing.folder.write_atomic

    def full_disk(path, data):
        if rank == 1:
            raise OSError("no space left on device")
        real(path, data)

    lingua.checkpointing.folder.write_atomic = full_disk
    try:
        manager.save(model, optimizer, state, CONFIG, mesh)
    except ld.RanksFailed as error:
        assert "rank 1: OSError: no space left" in str(error)
    else:
        raise AssertionError("a failed save raised nothing")
    finally:
        lingua.checkpointing.folder.write_atomic = real
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


def die_at_call(n, model, optimizer, state, folder, rule, async_save):
    """Save, and SIGKILL this process at the n-th system call that changes the disk."""
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
    if async_save:
        write_in_threads(pytest.MonkeyPatch())
    args = CheckpointArgs(path=str(folder), dump=rule, async_save=async_save)
    with CheckpointManager(args) as manager:
        manager.save(model, optimizer, state, CONFIG)


@pytest.mark.parametrize(
    "again, async_save",
    [(True, False), (False, True)],
    ids=["same step", "next step in the background"],
)
def test_a_kill_during_a_save_keeps_a_checkpoint(run, tmp_path, again, async_save):
    manager, model, optimizer, state = run
    shutil.copytree(manager.path, tmp_path / "before")
    if not again:
        train(3, model, optimizer, state)
    fork = multiprocessing.get_context("fork")
    # in the background the calls are the same, so a third of them is enough
    for n in range(1, 100, 3 if async_save else 1):
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
    assert child.exitcode == 0 and n > 10, "the kills must cover the whole save"
    assert names == {f"{state.step:010d}"}


def scramble_tensors(folder):
    file = folder / "__0_0.distcp"
    file.write_bytes(bytes(len(file.read_bytes())))


def edit_train_state(folder):
    file = folder / "train_state_00000.json"
    file.write_text(re.sub(r'"step": \d', '"step": 7', file.read_text()))


def drop_config(folder):
    (folder / "params.json").unlink()


def drop_manifest(folder):
    (folder / "manifest.json").unlink()


def replace_manifest(folder):
    (folder / "manifest.json").write_text("[]")


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"step": 2, "files": {"params.json": 3}}')


def edit_manifest(folder):
    """Without a known checksum only the size of a file would be checked."""
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"sha256"', '"sha266"', 1))


def flip_a_bit(folder):
    """Flip a bit of a weight; the file still loads."""
    file, weight = folder / "__0_0.distcp", "model.output.weight"
    metadata = FileSystemReader(folder).read_metadata()
    (place,) = [p for key, p in metadata.storage_data.items() if key.fqn == weight]
    data = bytearray(file.read_bytes())
    stored = torch.load(io.BytesIO(data[place.offset : place.offset + place.length]))
    at = data.find(stored.numpy().tobytes(), place.offset)
    assert at > 0
    data[at] ^= 1
    file.write_bytes(data)


def flip_a_bit_of_the_last_file(folder):
    file = sorted(folder.glob("*.distcp"))[-1]
    assert file.name == f"__0_{N_FILES - 1}.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = [
    truncate_tensors,
    scramble_tensors,
    flip_a_bit,
    edit_train_state,
    drop_config,
    drop_manifest,
    replace_manifest,
    damage_manifest,
    edit_manifest,
]


def test_a_damaged_file_of_any_thread_is_found(tmp_path, monkeypatch):
    write_in_threads(monkeypatch)
    manager, (model, optimizer, state) = manager_at(tmp_path), build()
    train(1, model, optimizer, state)
    manager.save(model, optimizer, state, CONFIG)
    flip_a_bit_of_the_last_file(manager.existing_saves[0])
    with pytest.raises(UserError, match=f"__0_{N_FILES - 1}.distcp differs"):
        manager.load(*build())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_previous_one(run, damage):
    manager, model, optimizer, state = run
    damage(manager.existing_saves[-1])
    model, optimizer, state = build()
    want, first_optimizer, _ = build()
    load_from_checkpoint(manager.existing_saves[0], want, first_optimizer)

    loaded = manager.load(model, optimizer, state)

    assert loaded is not None and loaded.step == state.step == 1
    assert_same_bits(tensors(model, optimizer), tensors(want, first_optimizer))


@pytest.mark.parametrize("damage", [edit_train_state, truncate_tensors, flip_a_bit])
def test_a_damaged_named_checkpoint_fails(run, damage, tmp_path):
    manager, *_ = run
    named = manager.existing_saves[0]
    damage(named)
    args = {"init_ckpt_path": str(named), "continue_training_from_init": True}
    with pytest.raises((UserError, ld.RanksFailed), match="differs from what was written"):
        manager_at(tmp_path / "new", **args).load(*build())


def test_clean_up_keeps_a_folder_with_a_foreign_manifest(run):
    manager, *_ = run
    replace_manifest(manager.existing_saves[0])
    manager.args.dump = SaveEvery(every=1, keep=1)
    manager.clean_up(2)
    assert [int(p.name) for p in manager.existing_saves] == [1, 2]


def test_a_damaged_checkpoint_does_not_displace_readable_ones(run):
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


def test_a_run_with_only_damaged_checkpoints_does_not_restart(run):
    manager, *fresh = run
    for folder in manager.existing_saves:
        truncate_tensors(folder)
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        manager.load(*fresh)


# ---- load


def test_loading_without_checkpoints_returns_none(tmp_path):
    assert manager_at(tmp_path).load(*build()) is None


def test_changes_of_the_config_are_reported(run):
    manager, *_ = run
    now = {"optim": {"lr": 0.01, "clip": 1.0}, "steps": STEPS}
    loaded = manager.load(*build(), config=now)
    assert loaded is not None
    assert len(loaded.differences) == 1
    assert loaded.differences[0].startswith("optim.lr: 0.05 -> 0.01")


def test_a_new_run_continues_from_init_ckpt_path(run, tmp_path):
    manager, *_ = run
    args = {"init_ckpt_path": str(manager.existing_saves[0]), "continue_training_from_init": True}
    model, optimizer, state = build()
    loaded = manager_at(tmp_path / "new", **args).load(model, optimizer, state)
    assert loaded is not None and loaded.step == state.step == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 2 / 4)


def test_another_shape_is_an_error_that_names_the_tensor(run):
    manager, *_ = run
    model, optimizer, state = build()
    model.rho = nn.Parameter(torch.zeros(7, 6))
    with pytest.raises(UserError, match=r"rho: \(3, 6\) in the checkpoint, \(7, 6\) in the model"):
        load_from_checkpoint(manager.existing_saves[-1], model)
    with pytest.raises(UserError, match="not a checkpoint folder"):
        load_from_checkpoint(manager.path, model)


def test_a_checkpoint_without_prefix_loads_with_an_empty_model_key(tmp_path):
    dcp.save(make_model().state_dict(), checkpoint_id=tmp_path, no_dist=True)
    model = Looped()
    load_from_checkpoint(tmp_path, model, model_key="")
    assert_same_bits(dict(model.named_parameters()), dict(make_model().named_parameters()))


def test_parameters_without_optimizer_state_stay_without(tmp_path):
    model, optimizer, state = build()
    model.rho.requires_grad_(False)
    train(1, model, optimizer, state)
    manager = manager_at(tmp_path)
    manager.save(model, optimizer, state, CONFIG)
    fresh_model, fresh, _ = build()
    load_from_checkpoint(manager.existing_saves[-1], fresh_model, fresh)
    assert not fresh.state[fresh_model.rho] and fresh.state[fresh_model.output.weight]


def test_a_changed_model_is_an_error_that_names_the_options(tmp_path):
    """Resuming with fewer layers would silently drop what they learned."""
    model, optimizer, state = build()
    manager = manager_at(tmp_path)
    saved = {"model": {"n_layers": 2}, "optim": {"lr": 0.05}}
    manager.save(model, optimizer, state, saved)

    smaller = make_model()
    smaller.layers = smaller.layers[:1]
    smaller_optimizer, _ = build_optimizer(smaller, OptimArgs(lr=0.05, warmup=4), STEPS)
    now = {"model": {"n_layers": 1}, "optim": {"lr": 0.1}}
    with pytest.raises(UserError, match="layers.1.norm.weight") as caught:
        manager.load(smaller, smaller_optimizer, state, config=now)
    assert "model.n_layers: 2 -> 1" in str(caught.value)
    assert "optim.lr" not in str(caught.value)
    load_from_checkpoint(
        manager.existing_saves[-1], smaller
    )  # without optimizer this is only a warning


def test_an_empty_path_is_an_error():
    with pytest.raises(UserError, match=r"checkpoint\.path"):
        CheckpointArgs(path="")
