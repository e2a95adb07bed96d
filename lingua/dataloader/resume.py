"""Check a saved data state against the options and files of the run that resumes from it.

The state, not the YAML, decides where the stream resumes. If the two disagree, the run is refused.
Only `data.root_dir` and `data.tokenizer.path` may change, and options that don't change the stream:
`data.load_async` and `data.pretokenized`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lingua.dataloader.args import DataArgs
from lingua.dataloader.jsonl import ChunksState, JSONLState, distribute_data_to_rank
from lingua.dataloader.packing import PrefetchState
from lingua.dataloader.reshard import (
    DataState,
    ReshardedState,
    SourceState,
    StreamState,
    is_resharded,
)
from lingua.dataloader.synthetic.args import build_task, options_of
from lingua.dataloader.synthetic.stream import TaskState
from lingua.errors import UserError

logger = logging.getLogger(__name__)


def check_state_matches(args: DataArgs, state: SourceState) -> list[str]:
    """Return a line for each difference between a saved state and `args`; if none, it resumes."""
    pairs = _pairs_of_task(args, state) if "task" in state else _pairs_of_text(args, state)
    if args.seed is not None:
        pairs["data.seed"] = (args.seed, state["seed"])
    return [
        f"{name} is {now}, the checkpoint was made with {saved}"
        for name, (now, saved) in pairs.items()
        if now != saved
    ]


def _pairs_of_task(args: DataArgs, state: TaskState) -> dict[str, tuple[Any, Any]]:
    now = {} if args.task is None else options_of(build_task(args.task))
    saved = state["task"]
    return {
        "data.batch_size": (args.batch_size, state["batch_size"]),
        **{f"data.task.{k}": (now.get(k), saved.get(k)) for k in saved},
    }


def _pairs_of_text(args: DataArgs, state: PrefetchState) -> dict[str, tuple[Any, Any]]:
    pack_state = state["it_state"]
    tokenizer_state = pack_state["it_state"]
    multi_state = tokenizer_state["it_state"]
    return {
        "data.task": (args.task and args.task.name, None),
        "data.batch_size": (args.batch_size, state["batch_size"]),
        "data.prefetch_size": (args.prefetch_size, state["prefetch_size"]),
        "data.seq_len": (args.seq_len, pack_state["output_seq_len"]),
        "data.n_views": (args.n_views, pack_state["n_views"]),
        "data.doc_mask": (args.doc_mask, pack_state["doc_mask"]),
        "data.tokenizer.name": (args.tokenizer.name, tokenizer_state["name"]),
        "data.add_bos": (args.add_bos, tokenizer_state["add_bos"]),
        "data.add_eos": (args.add_eos, tokenizer_state["add_eos"]),
        "data.sources": (args.sources, multi_state["sources"]),
    }


def reject_lingua_state(state: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a data state of Meta Lingua; ours has more fields."""
    if "it_state" in state and "world_size" not in state:
        raise UserError(
            f"cannot resume the data: {where} is a data state of Meta Lingua, which LT2 cannot "
            "read; start a new run from the weights with checkpoint.init_ckpt_path, and "
            "checkpoint.continue_training_from_init=false"
        )


def fit_state_to_args(args: DataArgs, state: DataState) -> DataState:
    """Return `state` with the paths of `args`; raise UserError for any other difference."""
    reject_lingua_state(state, "data_loader_state")
    if not is_resharded(state):
        return _fit_stream(args, cast(SourceState, state))
    streams = {
        key: StreamState(state=_fit_stream(args, stream["state"]), n_taken=stream["n_taken"])
        for key, stream in state["streams"].items()
    }
    return ReshardedState(**{**state, "streams": streams})


def _fit_stream(args: DataArgs, state: SourceState) -> SourceState:
    differences = check_state_matches(args, state)
    if differences:
        raise UserError(
            f"cannot resume the data: {'; '.join(differences)}. Restore the old values, or start a "
            "new run from the weights with checkpoint.init_ckpt_path"
        )
    if "task" in state:
        return state
    pack_state = state["it_state"]
    tokenizer_state = pack_state["it_state"]
    multi_state = tokenizer_state["it_state"]
    if args.tokenizer.path != tokenizer_state["path"]:
        logger.warning(
            "data.tokenizer.path was %s and is now %s: it must be the same tokenizer",
            tokenizer_state["path"],
            args.tokenizer.path,
        )
    root_dir = args.root_dir or multi_state["root_dir"]
    moved = {
        source: _move_share(share, str(Path(root_dir, source)), state["rank"], state["world_size"])
        for source, share in multi_state["source_to_state"].items()
    }
    multi_state = {**multi_state, "root_dir": root_dir, "source_to_state": moved}
    tokenizer_state = {**tokenizer_state, "it_state": multi_state, "path": args.tokenizer.path}
    return {**state, "it_state": {**pack_state, "it_state": tokenizer_state}}


def _move_share(share: ChunksState, folder: str, rank: int, world_size: int) -> ChunksState:
    """Return a rank's share of a source with its files in `folder`; check that they match."""

    def move(state: JSONLState) -> JSONLState:
        path = str(Path(folder, Path(state["file_path"]).name))
        return JSONLState(**{**state, "file_path": path})

    def files(share: ChunksState) -> set[tuple[str, int, int]]:
        states = (share, *share["waiting"])
        return {(s["file_path"], s["block_size"], s["offset"]) for s in states}

    waiting = [move(state) for state in share["waiting"]]
    moved = ChunksState(**{**move(share), "waiting": waiting})
    differing = files(moved) ^ files(distribute_data_to_rank(folder, rank, world_size))
    if differing:
        names = ", ".join(sorted({Path(path).name for path, *_ in differing}))
        raise UserError(
            f"cannot resume the data: the chunks in {folder} have changed since the checkpoint "
            f"({names}); restore them, or start a new run"
        )
    _check_position(moved)
    return moved


def _check_position(state: JSONLState) -> None:
    """Check that the saved position follows a line: otherwise the file has changed."""
    if state["position"] == 0:
        return
    with open(state["file_path"], "rb") as file:
        file.seek(state["position"] - 1)
        byte_before = file.read(1)
        at_end = not file.read(1)
    if not byte_before or (byte_before != b"\n" and not at_end):
        raise UserError(
            f"cannot resume the data: {state['file_path']} has no line that ends at byte "
            f"{state['position']}, so it has changed; restore it, or start a new run"
        )
