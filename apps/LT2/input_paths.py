"""Files and folders that a run reads, with the option of each: stool deletes none of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from apps.LT2.evaluation.args import EvalArgs, LMHarnessArgs
from apps.LT2.evaluation.validation import ValidationArgs

if TYPE_CHECKING:
    from apps.LT2.training.args import TrainArgs

InputPath = tuple[str, Path]


def read_by_training(args: TrainArgs) -> Iterator[InputPath]:
    root = args.data.root_dir or ""
    for source in args.data.sources:
        yield f"data.sources.{source}", Path(root, source)
    yield from _if_set("data.tokenizer.path", args.data.tokenizer.path)
    yield from _if_set("checkpoint.init_ckpt_path", args.checkpoint.init_ckpt_path)
    if args.eval is not None:
        yield from ((f"eval.{option}", path) for option, path in _read_for_scores(args.eval))


def read_by_evaluation(args: EvalArgs) -> Iterator[InputPath]:
    yield from _if_set("ckpt_dir", args.ckpt_dir)
    yield from _if_set("tokenizer_path", args.tokenizer_path)
    yield from _read_for_scores(args)


def _read_for_scores(args: EvalArgs) -> Iterator[InputPath]:
    if args.validation is not None:
        yield from _read_for_validation(args.validation)
    if args.harness is not None:
        yield from _read_by_harness(args.harness)


def _read_for_validation(args: ValidationArgs) -> Iterator[InputPath]:
    for source in args.sources:
        yield "validation.sources", Path(args.root_dir, source)


def _read_by_harness(args: LMHarnessArgs) -> Iterator[InputPath]:
    for task in args.tasks or []:
        if isinstance(task, str) and task.endswith(".yaml"):
            yield "harness.tasks", Path(task)
    yield from _if_set("harness.include_path", args.include_path)
    yield from _if_set("harness.use_cache", args.use_cache)


def _if_set(option: str, path: str | None) -> Iterator[InputPath]:
    if path:
        yield option, Path(path)


def with_files(paths: Iterable[InputPath]) -> Iterator[InputPath]:
    """The paths and, of folders, what is in them, which may be links."""
    for option, path in paths:
        yield option, path
        try:
            names = os.listdir(path)
        except OSError:  # a file, not there, or closed to us
            continue
        yield from ((option, path / name) for name in names)
