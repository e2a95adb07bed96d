"""Faults during a run: signals, full disks, dead workers, damaged files, NaN."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import apps.LT2.mixers.attention
import apps.LT2.train as app
import lingua.checkpointing.save
from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.training.trainer import Trainer
from lingua.checkpointing.folder import find_problem
from lingua.distributed import RanksFailed
from lingua.errors import UserError
from tests.lingua.dist_utils import run_ranks
from tests.LT2.tiny_run import (
    OPTIONS,
    SMALL,
    assert_same_run,
    checkpoint,
    stopped_after,
    train,
)
from tests.setup_scripts import load_script
from tests.tolerances import BF16_LAYER, FP32_MODEL, assert_same

N = OPTIONS["steps"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    return train(data, tmp_path_factory.mktemp("undisturbed"), **SMALL)


@contextmanager
def before_step(step: int, act: Callable[[Trainer], Any]) -> Iterator[None]:
    """Call `act` at the start of step number `step`, counted from 1, of runs inside."""
    inner = Trainer._read_micro_batches

    def read(self: Trainer) -> Any:
        if self.state.step == step - 1:
            act(self)
        return inner(self)

    Trainer._read_micro_batches = read
    try:
        yield
    finally:
        Trainer._read_micro_batches = inner


# ---- signals


def test_a_signal_in_any_micro_batch_stops_after_the_whole_step(data, tmp_path, monkeypatch):
    options = {**SMALL, "grad_acc_steps": 3, "steps": 3, "checkpoint.eval.every": 0}
    whole = train(data, tmp_path / "whole", **options)
    forward, n_calls = app.LoopedTransformer.forward, 0

    def interrupted(self, *args):
        nonlocal n_calls
        n_calls += self.training
        if n_calls == at:
            signal.raise_signal(signal.SIGTERM if at % 2 else signal.SIGUSR2)
        return forward(self, *args)

    monkeypatch.setattr(app.LoopedTransformer, "forward", interrupted)
    for at in (4, 5, 6):
        folder, n_calls = tmp_path / str(at), 0
        train(data, folder, **options)
        assert checkpoint(folder, 2).exists() and not checkpoint(folder, 3).exists()
        train(data, folder, **options)
        assert_same_run(folder, whole, 3)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_preempted_run_is_requeued_after_its_save(data, tmp_path, monkeypatch, async_save):
    """`scontrol requeue` ends the job at once, and would lose an unfinished save."""
    asked = tmp_path / "asked"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" $(ls {tmp_path}/run/checkpoints) >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    options = {**SMALL, "checkpoint.async_save": async_save}
    with stopped_after(3):
        train(data, tmp_path / "run", **options)
    assert asked.read_text() == "requeue 7 0000000002 0000000003\n"
    train(data, tmp_path / "run", **options)
    assert len(asked.read_text().splitlines()) == 1, "a finished job was requeued"


# ---- disks


@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_that_filled_the_disk_resumes_to_the_bit(data, undisturbed, tmp_path, async_save):
    options = {**SMALL, "checkpoint.async_save": async_save}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = (30_000, before[1])
    try:
        with (
            before_step(4, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, limits)),
            pytest.raises(RuntimeError, match="could not write .*0000000004"),
        ):
            train(data, tmp_path, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    names = {p.name for p in (tmp_path / "checkpoints").glob("0*")}
    assert names == {"0000000002", "0000000003"}, "a partial checkpoint is left"
    train(data, tmp_path, **options)
    assert_same_run(tmp_path, undisturbed, N)


def test_records_survive_a_full_disk(data, undisturbed, tmp_path):
    file, aside = tmp_path / "metrics.jsonl", tmp_path / "aside"

    def fill(_: Trainer) -> None:
        file.rename(aside)
        file.symlink_to("/dev/full")

    with before_step(3, fill), before_step(5, lambda _: aside.replace(file)):
        train(data, tmp_path, **SMALL)
    assert "metrics.jsonl cannot be written (No space left" in (tmp_path / "train.log").read_text()
    assert_same_run(tmp_path, undisturbed, N)


@pytest.mark.parametrize("name", ["__0_0.distcp", "train_state_00000.json"])
def test_a_run_with_a_damaged_checkpoint_resumes_to_the_bit(data, undisturbed, tmp_path, name):
    with stopped_after(5):
        train(data, tmp_path, **SMALL)
    file = checkpoint(tmp_path, 5) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train(data, tmp_path, **SMALL)
    log = (tmp_path / "train.log").read_text()
    assert log.count("trying the previous one") == 1  # it is read three times
    assert "0000000005" in log and "step 4" in log
    assert_same_run(tmp_path, undisturbed, N)


# ---- data


def test_a_damaged_token_file_is_a_user_error(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    script = load_script("tokenize_data")
    script.main([f"data.root_dir={root}", "data.sources={text: 1}", "data.tokenizer.name=bytes"])
    for file in root.glob("text/*.tokens"):
        tokens = np.fromfile(file, dtype=np.uint16)
        tokens[-1] = 258
        tokens.tofile(file)
    with pytest.raises(UserError, match="token 258 .*data.tokenizer.name=bytes"):
        train(root, tmp_path / "run", **SMALL, **{"data.pretokenized": True, "steps": 60})
    assert list((tmp_path / "run" / "checkpoints").glob("0*")), "no checkpoint is left"
    last = (tmp_path / "run" / "train.log").read_text().splitlines()[-1]
    assert "token 258" in last


# ---- errors during a save


def test_a_nan_does_not_lose_the_save_in_progress(data, tmp_path, monkeypatch):
    gate = threading.Event()
    write_data = lingua.checkpointing.save.FileSystemWriter.write_data

    def held(self, plan, planner):
        assert gate.wait(30)
        return write_data(self, plan, planner)

    def poison(trainer: Trainer) -> None:
        threading.Timer(0.2, gate.set).start()
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(math.nan)

    monkeypatch.setattr(lingua.checkpointing.save.FileSystemWriter, "write_data", held)
    with before_step(3, poison), pytest.raises(FloatingPointError, match="step 3"):
        train(data, tmp_path, **SMALL, **{"checkpoint.async_save": True})
    assert find_problem(checkpoint(tmp_path, 2)) is None


# ---- ranks

# fork: no forkserver for data workers.
FULL = {**SMALL, "distributed.fsdp_type": "full_shard", "distributed.spawn_method": "fork"}


def lose_worker_of_rank_1(rank, data, folder):
    # Two steps read more than the worker can prefetch.
    options = {**FULL, "model.dim": 16, "data.seq_len": 128, "grad_acc_steps": 8}
    options |= {"data.load_async": True, "data.prefetch_size": 1, "checkpoint.eval.every": 0}
    train(data, folder / "whole", **options)

    def kill_worker(_: Trainer) -> None:
        for worker in multiprocessing.active_children():
            if rank == 1 and worker.name == "data worker":
                os.kill(worker.pid or 0, signal.SIGKILL)

    with before_step(3, kill_worker), pytest.raises(RanksFailed) as caught:
        train(data, folder / "lost", **options)
    assert "rank 1: RuntimeError: the data worker (pid" in str(caught.value)
    assert not multiprocessing.active_children(), "a worker is left"
    train(data, folder / "lost", **options)


@contextmanager
def rotary_dtypes() -> Iterator[set[torch.dtype]]:
    module: Any = apps.LT2.mixers.attention
    inner, seen = module.rotary_angles, set()

    def record(*args: Any) -> Any:
        angles = inner(*args)
        seen.update(angle.dtype for angle in angles)
        return angles

    module.rotary_angles = record
    try:
        yield seen
    finally:
        module.rotary_angles = inner


TOKENS = torch.arange(24).view(2, 12) * 7 % 256


def sharded_logits_match_the_checkpoint(rank, data, folder, dtype, bound):
    logits = {}
    step = Trainer.step

    def keep_logits(self: Trainer) -> Any:
        result = step(self)
        if self.state.step == 2:
            with torch.no_grad():
                logits["training"] = self.model(TOKENS).float()
        return result

    Trainer.step = keep_logits
    try:
        with rotary_dtypes() as in_training:
            train(data, folder, steps=2, **{**FULL, "distributed.model_dtype": dtype})
    finally:
        Trainer.step = step
    with rotary_dtypes() as in_inference, torch.no_grad():
        model = load_model_and_tokenizer(str(folder), dtype=dtype, device="cpu").model
        logits["inference"] = model(TOKENS).float()
    assert in_training == in_inference == {torch.float32}
    assert_same(logits["training"], logits["inference"], bound)


def check_two_ranks(rank, world_size, data, folder):
    lose_worker_of_rank_1(rank, data, folder)
    for dtype, bound in (("fp32", FP32_MODEL), ("bf16", BF16_LAYER)):
        sharded_logits_match_the_checkpoint(rank, data, folder / dtype, dtype, bound)


def test_two_ranks_fail_together_and_save_what_they_compute(data, tmp_path):
    run_ranks(2, check_two_ranks, data, tmp_path)
    assert_same_run(tmp_path / "lost", tmp_path / "whole", N)
