"""Tokenize a run's data ahead of time, for `data.pretokenized: true`.

    python setup/tokenize_data.py config=apps/LT2/configs/600M/debug.yaml --workers 8

takes the run's options, so that the tokenizer, BOS and EOS match the run. It writes files beside
each chunk of the run's sources (lingua/dataloader/pretokenized.py). Chunks with complete files are
skipped and incomplete files are resumed, so an interrupted command can be run again.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lingua

from apps.LT2.training.args import TrainArgs
from lingua.args import parse_args
from lingua.config.cli import OneLineParser
from lingua.data import fill_in_sources, require_root_dir
from lingua.dataloader.args import DataArgs
from lingua.dataloader.jsonl import find_and_sanitize_chunks
from lingua.dataloader.prefetch import exit_with_parent
from lingua.dataloader.pretokenized import TokenFiles, TokenRecipe, write_token_files
from lingua.errors import UserError, run_cli
from lingua.prepare.corpus import file_errors
from lingua.tokenizer import build_tokenizer


def parse_options(argv: Sequence[str]) -> tuple[DataArgs, int]:
    parser = OneLineParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="key=value: the run's options, as for apps.LT2.train: config=FILE.yaml, data.*",
    )
    parser.add_argument("--workers", type=int, default=1, help="chunks to tokenize in parallel")
    given, overrides = parser.parse_with_overrides(argv)
    parser.require_positive(given, "workers")
    return parse_args(TrainArgs, overrides).data, given.workers


def tokenize_chunk(chunk: Path, args: DataArgs, recipe: TokenRecipe) -> dict[str, Any]:
    tokenizer = build_tokenizer(args.tokenizer.name, args.tokenizer.path)
    return write_token_files(chunk, tokenizer, recipe)


def end_with_parent() -> None:
    """End this worker if the program is killed: the next run resumes its files."""
    threading.Thread(target=exit_with_parent, daemon=True).start()


def main(argv: Sequence[str]) -> None:
    args, n_workers = parse_options(argv)
    args = fill_in_sources(args)
    tokenizer = build_tokenizer(args.tokenizer.name, args.tokenizer.path)
    tokenizer.check_specials(args.add_bos, args.add_eos)
    recipe, root = TokenRecipe.of(args), Path(require_root_dir(args))
    chunks = [
        Path(chunk)
        for source in args.sources
        for chunk in find_and_sanitize_chunks(str(root / source), 1)
    ]
    todo = [chunk for chunk in chunks if TokenFiles(chunk).find_problem(recipe) is not None]
    print(f"{len(chunks)} chunks, {len(todo)} to tokenize")
    started, n_tokens = time.perf_counter(), 0
    # fork: workers need not import torch again
    context = multiprocessing.get_context("fork")
    try:
        with file_errors(), ProcessPoolExecutor(n_workers, context, end_with_parent) as pool:
            tokenize = partial(tokenize_chunk, args=args, recipe=recipe)
            running = {pool.submit(tokenize, chunk): chunk for chunk in todo}
            try:
                for n_done, done in enumerate(as_completed(running), start=1):
                    facts = done.result()
                    n_tokens += facts["tokens"]
                    rate = n_tokens / (time.perf_counter() - started)
                    print(
                        f"{running[done]}: {facts['tokens']:,} tokens; {n_done} of {len(todo)} "
                        f"done, {rate:,.0f} tokens/s over all workers"
                    )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise UserError(
            f"--workers {n_workers}: a worker was killed, most often because memory ran out; run "
            "the same command with fewer workers or more memory to resume"
        ) from None


if __name__ == "__main__":
    run_cli(main)
