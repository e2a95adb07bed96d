"""Whole runs: bitwise resume, two ranks against one process, bad data, and signals."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import apps.LT2.train as app
from apps.LT2.evaluation.validation import Validator
from apps.LT2.training.evaluation import Evaluator
from apps.LT2.transformer import LoopedTransformer
from lingua.data import init_dataloader_state_from_args
from lingua.distributed import check_model_value_range
from lingua.errors import UserError
from lingua.optim import is_matrix
from tests.lingua.dist_utils import run_ranks
from tests.LT2.tiny import KINDS, tiny_args
from tests.LT2.tiny_run import (
    OPTIONS,
    SMALL,
    assert_same_run,
    checkpoint,
    column,
    command_line,
    stopped_after,
    tensors,
    train,
    train_states,
    write_corpus,
)
from tests.tolerances import FP32_MODEL, assert_same

N = OPTIONS["steps"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Return a function that trains without interruption, once for each set of options."""

    @cache
    def run(**changes) -> Path:
        return train(data, tmp_path_factory.mktemp("uninterrupted"), **changes)

    return run


# ---- resuming

RANDOM_LAYOUT = {
    "model.mixer": "window",
    "model.default_sliding_window": 4,
    "model.attention_pattern": "random:1:1",
}
# Checkpoints are written every 2 steps, and every 3 for evaluation.
STOPS = [
    (3, {**SMALL, "grad_acc_steps": 2, "data.load_async": True}),
    (3, {"logging.freq": 4, "checkpoint.async_save": True, "data.doc_mask": True}),
    (3, RANDOM_LAYOUT),
]


@pytest.mark.parametrize("stop, options", STOPS)
def test_a_stopped_run_resumes_to_the_bit(data, uninterrupted, tmp_path, stop, options):
    with stopped_after(stop):
        train(data, tmp_path, **options)
    assert [s["step"] for s in train_states(tmp_path, stop)] == [stop]
    assert not checkpoint(tmp_path, N).exists()
    train(data, tmp_path, **options)
    assert_same_run(tmp_path, uninterrupted(**options), N)


def test_a_run_that_stopped_several_times_resumes_to_the_bit(data, uninterrupted, tmp_path):
    for stop in (1, 2, 5):
        with stopped_after(stop):
            train(data, tmp_path)
    train(data, tmp_path)
    assert_same_run(tmp_path, uninterrupted(), N)


def train_and_be_killed(data: Path, dump_dir: Path, call: int, options: dict) -> None:
    """Train, with SIGKILL at step number `call`, from 1."""
    inner, n_calls = app.Trainer.step, 0

    def die(*args, **kwargs):
        nonlocal n_calls
        n_calls += 1
        if n_calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)

    app.Trainer.step = die
    torch.set_num_threads(1)
    train(data, dump_dir, **options)


def test_a_killed_run_resumes_to_the_bit(data, uninterrupted, tmp_path):
    options = {**SMALL, "data.load_async": True, "probe_freq": 2}
    options["distributed.spawn_method"] = "fork"  # starts in less time
    process = multiprocessing.get_context("forkserver").Process(
        target=train_and_be_killed, args=(data, tmp_path, 6, options)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = sorted(p.name for p in (tmp_path / "checkpoints").glob("[0-9]" * 10))
    assert [int(name) for name in found[-1:]] == [4]
    train(data, tmp_path, **options)
    assert_same_run(tmp_path, uninterrupted(**options), N)
    want, got = (run / "probe" / "probe.0.jsonl" for run in (uninterrupted(**options), tmp_path))
    assert got.read_text() == want.read_text()


def stop_and_resume(rank, world_size, data, tmp_path):
    options = {**SMALL, "grad_acc_steps": 2, "data.load_async": True}
    # fork: no forkserver for data workers
    options |= {"distributed.fsdp_type": "full_shard", "distributed.spawn_method": "fork"}
    want, got = tmp_path / "whole", tmp_path / "parts"
    train(data, want, **options)
    # A signal to one rank stops all.
    with stopped_after(3) if rank == world_size - 1 else nullcontext():
        train(data, got, **options)
    dist.barrier()
    assert checkpoint(got, 3).exists() and not checkpoint(got, 4).exists()
    train(data, got, **options)
    if rank == 0:
        assert len(train_states(got, N)) == world_size
        assert_same_run(got, want, N)


def test_two_stopped_ranks_resume_to_the_bit(data, tmp_path):
    run_ranks(2, stop_and_resume, data, tmp_path)


def test_an_interrupted_validation_is_repeated(data, uninterrupted, tmp_path, monkeypatch):
    """After the last step too: then all steps are done, but the run isn't."""
    validate = Validator.__call__

    def signal_then_validate(self, model, **options):
        signal.raise_signal(signal.SIGTERM)
        return validate(self, model, **options)

    options = {**SMALL, "checkpoint.eval.every": 0, "steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(Validator, "__call__", signal_then_validate)
        train(data, tmp_path / "parts", **options)
        train(data, tmp_path / "parts", **options)  # interrupts the repeated one
    parts, whole = tmp_path / "parts", uninterrupted(**options)
    assert (parts / "train.log").read_text().count("stopped after step 2 of 2") == 2
    assert column(parts, "loss/val") == []
    train(data, parts, **options)
    assert column(parts, "loss/val") == column(whole, "loss/val")
    torch.testing.assert_close(tensors(parts, 2), tensors(whole, 2), rtol=0, atol=0)


def test_a_finished_run_resumes_with_more_steps(data, tmp_path):
    options = {"optim.scheduler": "constant", "optim.warmup": 0, **SMALL}
    train(data, tmp_path / "parts", steps=4, **options)
    train(data, tmp_path / "parts", **options)
    train(data, tmp_path / "whole", **options)
    assert_tensors_same(tmp_path / "parts", tmp_path / "whole")


def test_init_ckpt_path_only_sets_the_weights(data, uninterrupted, tmp_path):
    """With a tiny learning rate, the final weights are the initial ones."""
    start = checkpoint(uninterrupted(), 4)
    options = {"checkpoint.init_ckpt_path": start, "steps": 2, "optim.lr": 1e-30}
    train(data, tmp_path, **options)
    got, want = tensors(tmp_path, 2)["model"], tensors(uninterrupted(), 4)["model"]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    (new,), (first,) = train_states(tmp_path, 2), train_states(uninterrupted(), 2)
    assert new["data_loader_state"] == first["data_loader_state"]
    assert column(tmp_path, "optim/lr") == pytest.approx([5e-31, 1e-30]), "warmup from step 0"


def test_continue_training_from_init_continues_the_run(data, uninterrupted, tmp_path):
    options: dict = {"checkpoint.init_ckpt_path": checkpoint(uninterrupted(), 2)}
    options["checkpoint.continue_training_from_init"] = True
    with stopped_after(4):
        train(data, tmp_path, **options)
    train(data, tmp_path, **options)  # from its own checkpoint
    assert "resumed from " + str(checkpoint(tmp_path, 4)) in (tmp_path / "train.log").read_text()
    assert_tensors_same(tmp_path, uninterrupted())
    assert train_states(tmp_path, N) == train_states(uninterrupted(), N)


def assert_tensors_same(got: Path, want: Path) -> None:
    torch.testing.assert_close(tensors(got, N), tensors(want, N), rtol=0, atol=0)


# ---- ranks


@contextmanager
def loader_of_all_ranks(args, state, world_size=2):
    """Concatenate the batches of `world_size` ranks into the batches of one process."""
    share = replace(args, batch_size=args.batch_size // world_size)
    with ExitStack() as stack:
        parts = [
            stack.enter_context(BUILD_LOADER(share, init_dataloader_state_from_args(share, *rank)))
            for rank in ((i, world_size) for i in range(world_size))
        ]

        def batches():
            while True:
                views, states = zip(*(next(part) for part in parts), strict=True)
                yield np.concatenate(views), states[0]

        yield batches()


BUILD_LOADER = app.build_dataloader_from_args
N_RANKED = 4
# A low learning rate: Adam takes full steps for tiny gradients, so rounding errors grow.
SLOW = {
    "optim.lr": 3e-4,
    "steps": N_RANKED,
    "checkpoint.dump.every": 0,
    "checkpoint.eval.every": 4,
}
FULL = {"distributed.fsdp_type": "full_shard", **SLOW}
# For two steps, gdn has momentum and no gradient.
CHANGING_LOOPS = {
    "model.n_layers": 1,
    "model.loop_count": 3,
    "model.attention_pattern": "full->gdn->full",
    "model.loop_schedule": "3@0, 1@0.25, 2@0.75",
    "model.loop_bptt": 2,
    "model.loop_loss": "gate",
}
RANK_CASES = {
    "full_shard": {**FULL, "checkpoint.dump.every": 2},
    "full_shard, changing loops": {**FULL, **CHANGING_LOOPS},
    "no_shard, accumulated, random layout": {
        **SLOW,
        **RANDOM_LAYOUT,
        "grad_acc_steps": 2,
    },
}


VALIDATE = Evaluator.log_validation_loss


def validate_and_check(self: Evaluator) -> None:
    """Steps that replay a CUDA graph would not free gathered weights."""
    VALIDATE(self)
    if self.args.distributed.fsdp_type == "full_shard":
        weights = self.trainer.model.named_parameters()
        assert all(isinstance(w, DTensor) for name, w in weights if is_matrix(name, w))


def train_cases(rank, world_size, data, tmp_path):
    for case, options in RANK_CASES.items():
        train(data, tmp_path / case, **options)


# The ranks of a TP group read the same data as one process.
TENSOR_PARALLEL = {**FULL, "distributed.tp_size": 2, "probe_freq": 4}


def train_on_two_ranks(rank, world_size, data, tmp_path):
    Evaluator.log_validation_loss = validate_and_check
    train_cases(rank, world_size, data, tmp_path)
    train(data, tmp_path / "tensor parallel", **TENSOR_PARALLEL)
    with stopped_after(1):
        train(data, tmp_path / "tensor parallel, resumed", **TENSOR_PARALLEL)
    train(data, tmp_path / "tensor parallel, resumed", **TENSOR_PARALLEL)


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(2, train_on_two_ranks, data, folder)
    return folder


def test_tensor_parallel_ranks_train_like_one_process(data, two_ranks, tmp_path):
    train(data, tmp_path, **SLOW, probe_freq=4)
    got = two_ranks / "tensor parallel"
    assert_near(got, tmp_path)
    assert_same_run(two_ranks / "tensor parallel, resumed", got, N_RANKED)
    assert len(train_states(got, N_RANKED)) == 1, "they share one data position"
    for key in ("loops/first_token_mass/1", "loops/update_norm/1", "layers/grad_norm/1"):
        assert column(got, key) == pytest.approx(column(tmp_path, key), rel=FP32_MODEL), key
    assert flops_per_token(got) == pytest.approx(flops_per_token(tmp_path))


def flops_per_token(dump_dir: Path) -> float:
    lines = (dump_dir / "metrics.jsonl").read_text().splitlines()
    record = next(r for r in map(json.loads, lines) if "speed/wps" in r)
    return record["speed/FLOPS"] / record["speed/wps"]


@pytest.mark.parametrize("case", RANK_CASES)
def test_two_ranks_train_like_one_process(data, two_ranks, tmp_path, monkeypatch, case):
    monkeypatch.setattr(app, "build_dataloader_from_args", loader_of_all_ranks)
    alone = {k: v for k, v in RANK_CASES[case].items() if not k.startswith("distributed.")}
    train(data, tmp_path, **alone, **{"data.batch_size": 2 * OPTIONS["data.batch_size"]})
    assert_near(two_ranks / case, tmp_path)


def test_half_the_ranks_with_twice_the_micro_batches_take_the_same_steps(data, two_ranks, tmp_path):
    half = shutil.copytree(two_ranks / "full_shard", tmp_path / "half")
    shutil.rmtree(checkpoint(half, N_RANKED))
    train(data, half, grad_acc_steps=2, **SLOW)
    assert "resumed from " + str(checkpoint(half, 2)) in (half / "train.log").read_text()
    assert_near(half, two_ranks / "full_shard")


def assert_near(got: Path, want: Path) -> None:
    """Compare metrics and final weights up to rounding."""
    for key in ("loss/out", "loss/val", "loss/val_bpb", "optim/grad_norm"):
        assert column(got, key) == pytest.approx(column(want, key), rel=FP32_MODEL), key
    assert column(got, "optim/lr") == column(want, "optim/lr")
    assert column(got, "optim/total_tokens") == column(want, "optim/total_tokens")
    weights, wanted = (tensors(run, N_RANKED)["model"] for run in (got, want))
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert_same(weights[name], weight, FP32_MODEL, name)


@contextmanager
def loader_of_joined_batches(args, state, n=3):
    """Concatenate `n` micro-batches into each batch."""
    share = replace(args, batch_size=args.batch_size // n)
    with BUILD_LOADER(share, init_dataloader_state_from_args(share, 0, 1)) as part:

        def batches():
            while True:
                views, states = zip(*(next(part) for _ in range(n)), strict=True)
                yield np.concatenate(views), states[-1]

        yield batches()


def test_micro_batches_equal_one_large_batch(data, tmp_path, monkeypatch):
    train(data, tmp_path / "micro", grad_acc_steps=3, **SLOW)
    monkeypatch.setattr(app, "build_dataloader_from_args", loader_of_joined_batches)
    train(data, tmp_path / "one", **SLOW, **{"data.batch_size": 3 * OPTIONS["data.batch_size"]})
    assert_near(tmp_path / "micro", tmp_path / "one")


# ---- bad data


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory) -> Path:
    """Truncate line 9 of the first chunk, which only rank 0 of two reads."""
    root = write_corpus(tmp_path_factory.mktemp("bad"))
    chunk = root / "text" / "text.chunk.00.jsonl"
    lines = chunk.read_text().splitlines(keepends=True)
    lines[8] = lines[8][:9] + "\n"
    chunk.write_text("".join(lines))
    return root


@pytest.mark.parametrize("load_async", [False, True])
def test_a_malformed_line_is_named(bad_data, tmp_path, load_async):
    with pytest.raises(UserError, match=r"text\.chunk\.00\.jsonl:9: not JSON"):
        train(bad_data, tmp_path, steps=100, **{"data.load_async": load_async})


def test_a_malformed_line_prints_one_error_for_all_ranks(bad_data, tmp_path, quick_python):
    changes = {"steps": 100, "data.load_async": True, "distributed.fsdp_type": "full_shard"}
    arguments = command_line(bad_data, tmp_path, changes)
    done = quick_python.run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "apps.LT2.train", *arguments),
        capture_output=True,
        text=True,
        timeout=90,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "text.chunk.00.jsonl:9: not JSON" in errors[0]
    assert done.stderr.index(errors[0]) < done.stderr.index("ChildFailedError")
    reported = f"traceback : {errors[0].removeprefix('error: ')}"
    assert reported in done.stderr and "To enable traceback see" not in done.stderr
    own_code = Path(app.__file__).as_posix()
    assert f'File "{own_code}"' not in done.stderr, "a traceback for a user's mistake"


def test_validation_text_is_read_before_training(data, tmp_path):
    root = write_corpus(tmp_path / "data")
    with open(root / "text" / "text.val.jsonl", "a") as file:
        file.write("[]\n")
    with pytest.raises(UserError, match=r"text\.val\.jsonl:4: a line must be a JSON object"):
        train(root, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- signals


def test_sigterm_to_all_processes_saves_and_exits(data, uninterrupted, tmp_path):
    """`scancel` and `kill -TERM -PGID` also signal the data worker."""
    # More micro-batches than the worker can prefetch.
    options = {"data.load_async": True, "grad_acc_steps": 8, "steps": 2, "data.seq_len": 512}
    options |= {**SMALL, "data.prefetch_size": 1}
    pipe, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(
        target=train_and_be_terminated, args=(data, tmp_path, theirs, options)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0 and pipe.recv() == "exited"
    assert checkpoint(tmp_path, 1).exists() and not checkpoint(tmp_path, 2).exists()
    train(data, tmp_path, **options)
    assert_same_run(tmp_path, uninterrupted(**options), 2)


def train_and_be_terminated(data: Path, dump_dir: Path, pipe, options: dict) -> None:
    """Train, with SIGTERM to the trainer, its worker and the forkserver before step 1."""
    inner = app.Trainer.step

    def step(self):
        if self.state.step == 0:
            (worker,) = multiprocessing.active_children()
            for pid in (worker.pid, multiprocessing.forkserver._forkserver._forkserver_pid):
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.1)
            signal.raise_signal(signal.SIGTERM)
        return inner(self)

    app.Trainer.step = step
    torch.set_num_threads(1)
    train(data, dump_dir, **options)
    pipe.send("exited")


@pytest.mark.parametrize("kind", KINDS)
def test_zero_at_start_names_the_zero_weights(kind):
    model = LoopedTransformer(tiny_args(kind, 2, gated_attn=True))
    model.init_weights()
    assert check_model_value_range(model, zero_init=app.zero_at_start()) == []
    names = [name for name, _ in model.named_parameters()]
    named = [name for name in names if name.endswith(tuple(app.zero_at_start()))]
    assert named == [name for name, weight in model.named_parameters() if not weight.any()]


# ---- the start of the log


def test_a_run_starts_with_a_summary(data, tmp_path):
    options = {**RANDOM_LAYOUT, "model.gdn.expand_v": 1, "grad_acc_steps": 2, "steps": 1}
    train(data, tmp_path, name="first", **options)
    log = (tmp_path / "train.log").read_text()
    for text in (
        "run first",
        "2 layers x 2 loops",
        "loop 0*",
        "text (100%)",
        "tokenizer bytes",
        "1 x CPU",
        "128 tokens per step",
        f"{tmp_path}/config.yaml",
        "model.gdn has no effect",
    ):
        assert text in log, text
    assert "weight_decay" not in log, "the whole config is logged"
