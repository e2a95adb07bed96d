"""Measure saving and loading a checkpoint beside plain writes and reads of as many bytes.

    python -m apps.LT2.scripts.benchmark_checkpoint --folder DISK \\
        config=apps/LT2/configs/1B/looped_hybrid_gdn_4to1_1B.yaml

Model and optimizer come from the recipe; tokens are random, so no data is needed. All rows run
in each repeat. The plain write uses as many threads as a save, each with its own file and a final
fsync. Reads and loads come from the disk, because the cache of the files is dropped before. With
checkpoint.async_save, training waits for the copy and slows down during the write: `added` is the
time from the save to its publication, without the usual time of the steps. A row is the median of
the repeats with quartiles; the last line of stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.LT2.benchmark.timing import Spread, environment, synchronize
from apps.LT2.describe import read_config
from apps.LT2.train import build_model
from apps.LT2.training.args import TrainArgs, check_device
from apps.LT2.training.trainer import Trainer, TrainState
from apps.LT2.transformer import build_on_meta
from lingua.checkpoint import CheckpointArgs, CheckpointManager
from lingua.checkpointing.metadata import map_in_threads, max_threads
from lingua.checkpointing.save import warn_of_small_disk
from lingua.config.cli import OneLineParser
from lingua.distributed import (
    dist_max,
    fit_to_world,
    get_device,
    get_device_mesh,
    get_global_rank,
    get_is_master,
    get_world_size,
    run_on_rank_0,
    run_together,
    setup_env,
    setup_torch_distributed,
)
from lingua.errors import UserError, run_cli
from lingua.optim import build_optimizer
from lingua.rng import seed_everything

if TYPE_CHECKING:
    import numpy as np

BLOCK = 2**26  # bytes of a plain write or read
NO_DATA: Any = {}  # state of a data loader


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, TrainArgs]:
    parser = OneLineParser(
        prog="python -m apps.LT2.scripts.benchmark_checkpoint",
        description=(__doc__ or "").splitlines()[0],
        epilog="key=value: options of a run, as for apps.LT2.train; the batch is data.batch_size",
    )
    parser.add_argument("--folder", default=".", metavar="PATH", help="on the disk to measure")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="usual steps per repeat")
    given, overrides = parser.parse_with_overrides(argv)
    parser.require_positive(given, "repeats", "steps")
    if not Path(given.folder).is_dir():
        raise UserError(f"--folder {given.folder}: no such folder")
    configs = [option for option in overrides if option.startswith("config=")]
    if len(configs) != 1:
        raise UserError("name one recipe, as config=FILE.yaml")
    options = [option for option in overrides if option not in configs]
    args = read_config(configs[0].removeprefix("config="), options)
    return given, replace(
        args,
        model=replace(args.model, seed=args.seed),
        data=replace(args.data, doc_mask=False),
        distributed=fit_to_world(args.distributed, get_world_size()),
    )


def build_trainer(args: TrainArgs) -> Trainer:
    device, mesh = get_device(), get_device_mesh(args.distributed)
    model = build_on_meta(args.model)
    build_model(args, mesh, device, model)
    optimizer, scheduler = build_optimizer(model, args.optim, args.steps)
    state = TrainState(0, 0, NO_DATA, scheduler)
    return Trainer(args, model, optimizer, state, random_batches(args), mesh, device)


def random_batches(args: TrainArgs) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    import numpy as np

    rng = np.random.default_rng(args.seed)
    shape = (args.data.batch_size, args.data.seq_len, 2)
    while True:
        yield rng.integers(args.model.vocab_size, size=shape), NO_DATA


class Benchmark:
    """Times actions in one folder. Its methods are collectives."""

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer, self.folder = trainer, folder
        self.seconds: dict[str, list[float]] = {}
        self.n_bytes = 0  # of all tensor files of a checkpoint

    def manager(self, **options: Any) -> CheckpointManager:
        args = CheckpointArgs(path=str(self.folder / "checkpoints"), **options)
        return CheckpointManager.instantiate_and_make_dir(args)

    def save(self, manager: CheckpointManager) -> None:
        trainer = self.trainer
        trainer.state.clear_losses()
        manager.save(trainer.model, trainer.optimizer, trainer.state, trainer.args, trainer.mesh)

    def clock(self, action: Callable[[], Any]) -> float:
        """Return the seconds of the slowest rank."""
        synchronize(self.trainer.device)
        run_on_rank_0(lambda: None)  # all ranks start together
        began = time.perf_counter()
        action()
        synchronize(self.trainer.device)
        return dist_max(time.perf_counter() - began).item()

    def time(self, name: str, action: Callable[[], Any]) -> None:
        self.add(name, self.clock(action))

    def add(self, name: str, *seconds: float) -> None:
        """Keep the seconds, and show them: a large checkpoint takes minutes."""
        self.seconds.setdefault(name, []).extend(seconds)
        if get_is_master():
            print(
                f"{name}: {', '.join(f'{s:.2f}' for s in seconds)} s", file=sys.stderr, flush=True
            )

    def clear(self) -> None:
        run_on_rank_0(lambda: [shutil.rmtree(path) for path in self.folder.iterdir()])

    def repeat(self, n_steps: int) -> None:
        """Time each row once."""
        self.measure_disk()
        trainer = self.trainer
        usual = [self.clock(trainer.step) for _ in range(n_steps)]
        self.add("training step", *usual)
        self.measure_background(statistics.median(usual))

    def measure_disk(self) -> None:
        trainer, manager = self.trainer, self.manager()
        self.time("save", lambda: self.save(manager))
        files = sorted(self.folder.glob("*/*/*.distcp"))
        self.n_bytes = sum(file.stat().st_size for file in files)
        own = files[get_global_rank() :: get_world_size()]
        drop_cache(own)
        self.time("plain read", lambda: map_in_threads(read_plainly, own))
        drop_cache(own)
        fresh = TrainState(0, 0, NO_DATA, trainer.state.scheduler)
        into = (trainer.model, trainer.optimizer, fresh, trainer.mesh)
        self.time("load", lambda: manager.load(*into))
        self.clear()
        n_files = max_threads()
        share = self.n_bytes // get_world_size() // n_files
        plain = self.folder / "plain"
        run_on_rank_0(plain.mkdir)
        targets = [plain / f"{get_global_rank()}_{i}" for i in range(n_files)]
        block = random.Random(0).randbytes(BLOCK)
        write = partial(write_plainly, block=block, n_bytes=share)
        self.time("plain write", lambda: run_together(lambda: map_in_threads(write, targets)))
        self.clear()

    def measure_background(self, usual: float) -> None:
        """Time what a save in the background adds to steps of `usual` seconds."""
        manager, steps = self.manager(async_save=True), []
        waits = self.clock(lambda: self.save(manager))
        self.add("async_save: wait for the copy", waits)
        step = self.trainer.state.step
        published = self.folder / "checkpoints" / f"{step:010d}"
        polls = 0.0
        while not run_on_rank_0(published.is_dir):
            steps.append(self.clock(self.trainer.step))
            polls += self.clock(manager.poll)
        added = waits + polls + sum(steps) - usual * len(steps)
        self.add("async_save: step meanwhile", *steps)
        self.add("async_save: added in all", added)
        self.clear()

    def rows(self) -> dict[str, Spread]:
        return {name: Spread.of(values) for name, values in self.seconds.items()}


def write_plainly(target: Path, block: bytes, n_bytes: int) -> None:
    with open(target, "wb", buffering=0) as stream:
        while n_bytes > 0:
            n_bytes -= stream.write(memoryview(block)[:n_bytes])
        os.fsync(stream.fileno())


def read_plainly(file: Path) -> None:
    buffer = bytearray(BLOCK)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def drop_cache(files: Sequence[Path]) -> None:
    for file in files if hasattr(os, "posix_fadvise") else ():
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


PLAIN = {"save": "plain write", "load": "plain read"}


def format_rows(rows: dict[str, Spread], n_bytes: int) -> Iterator[str]:
    yield f"{'':32s}{'seconds':>9s}  {'quartiles':>16s}  {'GB/s':>6s}  of plain"
    for name in ("plain write", "save", "plain read", "load"):
        rate = f"{n_bytes / rows[name].median / 1e9:6.2f}"
        plain = PLAIN.get(name)
        share = f"{rows[plain].median / rows[name].median:8.0%}" if plain else ""
        yield f"{format_row(name, rows[name])}  {rate}  {share}".rstrip()
    for name in [name for name in rows if name.startswith(("training", "async"))]:
        yield format_row(name, rows[name])


def format_row(name: str, row: Spread) -> str:
    return f"{name:32s}{row.median:9.3f}  {f'{row.low:.3f}-{row.high:.3f}':>16s}"


def main(argv: Sequence[str]) -> None:
    given, args = parse_options(argv)
    check_device(args.model, args.distributed)
    setup_env(args.env)
    setup_torch_distributed(args.distributed)
    seed_everything(args.seed)
    trainer = build_trainer(args)
    for step in range(2):  # compile, and allocate the optimizer's state
        if get_is_master():
            print(f"warm-up step {step + 1} of 2 ...", file=sys.stderr, flush=True)
        trainer.step()
    warn_of_small_disk(Path(given.folder), trainer.optimizer, get_world_size())
    folder = run_on_rank_0(lambda: Path(tempfile.mkdtemp(prefix="checkpoint_", dir=given.folder)))
    try:
        benchmark = Benchmark(trainer, folder)
        for _ in range(given.repeats):
            benchmark.repeat(given.steps)
    finally:
        trainer.free_graphs()
        if get_is_master():
            shutil.rmtree(folder, ignore_errors=True)
    if not get_is_master():
        return
    n_bytes, rows = benchmark.n_bytes, benchmark.rows()
    n_ranks, n_threads = get_world_size(), max_threads()
    print(f"{n_bytes / 1e9:.2f} GB, {n_ranks} ranks, at most {n_threads} threads per rank")
    print("\n".join(format_rows(rows, n_bytes)))
    counts = {"bytes": n_bytes, "ranks": n_ranks, "threads": n_threads, "repeats": given.repeats}
    print(json.dumps(environment(trainer.device) | counts | {"seconds": rows}))


if __name__ == "__main__":
    run_cli(main)
