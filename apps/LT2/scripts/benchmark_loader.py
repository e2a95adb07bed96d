"""Measure tokens/s of the data loader, from text and from pretokenized files.

    python -m apps.LT2.scripts.benchmark_loader config=apps/LT2/configs/600M/debug.yaml

The two kinds run alternately. A row is the median of the repeats with quartiles; the last line of
stdout is the result as JSON. Token files come from setup/tokenize_data.py; if missing, only text is
measured. The first block of `data.prefetch_size` batches is read before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from apps.LT2.benchmark.timing import Spread, device_name
from apps.LT2.training.args import TrainArgs
from lingua.args import parse_args
from lingua.config.cli import OneLineParser
from lingua.data import (
    build_dataloader_from_args,
    init_dataloader_state_from_args,
    validate_data_args,
)
from lingua.dataloader.args import DataArgs
from lingua.errors import UserError, run_cli


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, DataArgs]:
    parser = OneLineParser(
        prog="python -m apps.LT2.scripts.benchmark_loader",
        description=(__doc__ or "").splitlines()[0],
        epilog="key=value: options of a run, as for apps.LT2.train: config=FILE.yaml, data.*, seed",
    )
    parser.add_argument("--batches", type=int, default=100, metavar="N", help="per repeat")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="per kind")
    given, overrides = parser.parse_with_overrides(argv)
    parser.require_positive(given, "batches", "repeats")
    for override in overrides:
        if not override.startswith(("config=", "data.", "seed=")):
            raise UserError(f"{override}: this benchmark takes only config, data.* and seed")
    args = parse_args(TrainArgs, overrides)
    seed = args.data.seed if args.data.seed is not None else args.seed
    # A worker process would run ahead between the repeats.
    return given, replace(args.data, seed=seed, load_async=False)


def kinds_of(data: DataArgs) -> dict[str, DataArgs]:
    if data.task is not None:
        return {"task": data}
    lines, token_files = (replace(data, pretokenized=value) for value in (False, True))
    validate_data_args(lines, 1)
    try:
        validate_data_args(token_files, 1)
    except UserError as error:
        print(f"not measured: {error}")
        return {"lines": lines}
    return {"lines": lines, "token files": token_files}


def measure(kinds: dict[str, DataArgs], n_batches: int, n_repeats: int) -> dict[str, Spread]:
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    with ExitStack() as stack:
        loaders = {
            name: stack.enter_context(
                build_dataloader_from_args(args, init_dataloader_state_from_args(args, 0, 1))
            )
            for name, args in kinds.items()
        }
        for loader in loaders.values():
            next(loader)
        for _ in range(n_repeats):
            for name, loader in loaders.items():
                started = time.perf_counter()
                n_tokens = sum(next(loader)[0][..., 0].size for _ in range(n_batches))
                rates[name].append(n_tokens / (time.perf_counter() - started))
    return {name: Spread.of(values) for name, values in rates.items()}


def main(argv: Sequence[str]) -> None:
    given, data = parse_options(argv)
    found = measure(kinds_of(data), given.batches, given.repeats)
    for name, rate in found.items():
        print(f"{name:12s} {rate.median:12,.0f} tokens/s ({rate.low:,.0f}-{rate.high:,.0f})")
    result = {"device": device_name(torch.device("cpu")), "batches": given.batches}
    print(json.dumps({**result, "repeats": given.repeats, "tokens_per_s": found}))


if __name__ == "__main__":
    run_cli(main)
