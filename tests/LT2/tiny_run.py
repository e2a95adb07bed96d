"""Training runs of a second: a corpus, options, and the files of a run."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import apps.LT2.train as app
from apps.LT2.train import TrainArgs
from lingua.args import parse_args
from lingua.rng import get_rng_state, set_rng_state

WORDS = ["the", "loop", "turns", "again", "and", "every", "layer", "sees", "its", "past", "äöü"]

# A small GDN hybrid with what sharding could break: tied embeddings, residual gates, two loops.
OPTIONS: dict[str, Any] = {
    "steps": 6,
    "seed": 7,
    "optim.lr": 3e-2,
    "optim.warmup": 2,
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.multiple_of": 16,
    "model.loop_count": 2,
    "model.weight_tying": True,
    "model.mixer": "gdn",
    "model.attention_pattern": "1:1",
    "data.batch_size": 2,
    "data.seq_len": 32,
    "data.prefetch_size": 2,
    "data.load_async": False,
    "data.tokenizer.name": "bytes",
    "distributed.model_dtype": "fp32",
    "checkpoint.dump.every": 2,
    "checkpoint.eval.every": 3,
    "logging.freq": 1,
}

# The smallest model.
SMALL = {"model.n_layers": 1, "model.mixer": "full", "model.attention_pattern": None}
TWO_LAYERS = {**SMALL, "model.n_layers": 2}


def write_corpus(root: Path, *, n_chunks: int = 2, n_lines: int = 12, n_val: int = 3) -> Path:
    """Write a data folder with one source, `text`. The text is always the same."""
    rng = random.Random(0)
    folder = root / "text"
    folder.mkdir(parents=True)

    def line() -> str:
        words = rng.choices(WORDS, k=rng.randint(3, 20))
        return json.dumps({"text": " ".join(words)}) + "\n"

    for i in range(n_chunks):
        (folder / f"text.chunk.{i:02d}.jsonl").write_text("".join(line() for _ in range(n_lines)))
    if n_val:
        (folder / "text.val.jsonl").write_text("".join(line() for _ in range(n_val)))
    return root


def command_line(data: Path, dump_dir: Path, changes: dict[str, Any]) -> list[str]:
    options = {
        **OPTIONS,
        "data.root_dir": data,
        "data.sources.text": 1.0,
        "dump_dir": dump_dir,
        **changes,
    }
    return [f"{name}={'null' if value is None else value}" for name, value in options.items()]


def train_args(data: Path, dump_dir: Path, **changes: Any) -> TrainArgs:
    """Parse options by dotted name: `**{"data.seq_len": 16}`."""
    return parse_args(TrainArgs, command_line(data, dump_dir, changes))


def train(data: Path, dump_dir: Path, *, keep_code: bool = False, **changes: Any) -> Path:
    """Train in this process, restore its state, and return dump_dir.

    Without `keep_code` the run skips its copy of the code, which takes longer than training.
    """
    with clean_process(), nullcontext() if keep_code else without_code_copy():
        app.train(train_args(data, dump_dir, **changes))
    return dump_dir


@contextmanager
def without_code_copy() -> Iterator[None]:
    inner = app.snapshot_code, app.version_record
    app.snapshot_code = lambda root, target, without: 0
    app.version_record = lambda root: "{}"  # else git runs three times
    try:
        yield
    finally:
        app.snapshot_code, app.version_record = inner


@contextmanager
def clean_process() -> Iterator[None]:
    """Restore what a run changes: signal and log handlers, random state, the process group."""
    had_group = dist.is_initialized()
    generators = get_rng_state()
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    root = logging.getLogger()
    loggers, level = list(root.handlers), root.level
    # A forkserver that was started for a data worker blocks signals, and so do its children.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    try:
        yield
    finally:
        if dist.is_initialized() and not had_group:
            dist.destroy_process_group()
        set_rng_state(generators)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for handler in set(root.handlers) - set(loggers):
            root.removeHandler(handler)
            handler.close()
        root.handlers[:] = loggers
        root.setLevel(level)


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Send runs inside SLURM's signal after `step`."""
    inner = app.Trainer.step

    def step_and_signal(self: app.Trainer) -> Any:
        result = inner(self)
        if self.state.step == step:
            signal.raise_signal(signal.SIGUSR2)
        return result

    app.Trainer.step = step_and_signal
    try:
        yield
    finally:
        app.Trainer.step = inner


# ---- the files of a run


def checkpoint(dump_dir: Path, step: int) -> Path:
    return dump_dir / "checkpoints" / f"{step:010d}"


def tensors(dump_dir: Path, step: int) -> dict[str, Any]:
    """Load all tensors of a checkpoint, unsharded."""
    file = dump_dir / f"tensors_{step}.pt"
    dcp_to_torch_save(checkpoint(dump_dir, step), file)
    try:
        return torch.load(file)
    finally:
        file.unlink()


def train_states(dump_dir: Path, step: int) -> list[dict[str, Any]]:
    files = sorted(checkpoint(dump_dir, step).glob("train_state_*.json"))
    states = [json.loads(file.read_text()) for file in files]
    return [{k: v for k, v in s.items() if not k.startswith(TIMES)} for s in states]


TIMES = ("speed/", "time/", "created", "seconds")


def records(dump_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without times and speeds."""
    lines = (dump_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(TIMES)} for line in lines
    ]


def column(dump_dir: Path, key: str) -> list[Any]:
    return [record[key] for record in records(dump_dir) if key in record]


def assert_same_run(got: Path, want: Path, step: int) -> None:
    """Compare weights, optimizer, data position, random state and metrics bit by bit."""
    torch.testing.assert_close(tensors(got, step), tensors(want, step), rtol=0, atol=0)
    assert train_states(got, step) == train_states(want, step)
    assert records(got) == records(want)


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }
