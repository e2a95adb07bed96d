"""A saved state of the data, held against the options and files of the run that resumes from it.

The state, not the YAML, says where the stream goes on. So where the two disagree the run is
refused: going on either way would ignore something. Only places may change: `data.root_dir`,
`data.tokenizer.path`, and what does not show in the stream: `data.load_async`, `data.pretokenized`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from lingua.dataloader.args import DataArgs
from lingua.dataloader.jsonl import ChunksState, JSONLState, distribute_data_to_rank
from lingua.dataloader.packing import PrefetchState
from lingua.dataloader.reshard import DataState, ReshardedState, StreamState, is_resharded
from lingua.errors import UserError

logger = logging.getLogger(__name__)


def check_state_matches(args: DataArgs, state: PrefetchState) -> list[str]:
    """How a saved state differs from what is asked for now, one line each; none: it can resume."""
    pack_state = state["it_state"]
    tokenizer_state = pack_state["it_state"]
    multi_state = tokenizer_state["it_state"]
    pairs = {
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
    if args.seed is not None:
        pairs["data.seed"] = (args.seed, state["seed"])
    return [
        f"{name} is {now}, the checkpoint was made with {saved}"
        for name, (now, saved) in pairs.items()
        if now != saved
    ]


def fit_state_to_args(args: DataArgs, state: DataState) -> DataState:
    """`state` with the paths that `args` gives; refused if anything else is not as it was."""
    if not is_resharded(state):
        return _fit_stream(args, cast(PrefetchState, state))
    streams = {
        key: StreamState(state=_fit_stream(args, stream["state"]), n_taken=stream["n_taken"])
        for key, stream in state["streams"].items()
    }
    return ReshardedState(**{**state, "streams": streams})


def _fit_stream(args: DataArgs, state: PrefetchState) -> PrefetchState:
    differences = check_state_matches(args, state)
    if differences:
        raise UserError(
            f"cannot resume the data: {'; '.join(differences)}. Set it back, or begin a new run "
            "from the weights with checkpoint.init_ckpt_path"
        )
    pack_state = state["it_state"]
    tokenizer_state = pack_state["it_state"]
    multi_state = tokenizer_state["it_state"]
    if args.tokenizer.path != tokenizer_state["path"]:
        logger.warning(
            "data.tokenizer.path was %s and is %s now: the file must be the same one",
            tokenizer_state["path"],
            args.tokenizer.path,
        )
    root_dir = args.root_dir or multi_state["root_dir"]
    moved = {
        source: _move(share, str(Path(root_dir, source)), state["rank"], state["world_size"])
        for source, share in multi_state["source_to_state"].items()
    }
    multi_state = {**multi_state, "root_dir": root_dir, "source_to_state": moved}
    tokenizer_state = {**tokenizer_state, "it_state": multi_state, "path": args.tokenizer.path}
    return {**state, "it_state": {**pack_state, "it_state": tokenizer_state}}


def _move(share: ChunksState, folder: str, rank: int, world_size: int) -> ChunksState:
    """A rank's place in a source, now in `folder`, after a look whether its files are the same."""
    places = [share, *share["waiting"]]
    moved, *waiting = (
        JSONLState(
            file_path=str(Path(folder, Path(place["file_path"]).name)),
            position=place["position"],
            block_size=place["block_size"],
            offset=place["offset"],
            current_iter=place["current_iter"],
        )
        for place in places
    )
    now = distribute_data_to_rank(folder, rank, world_size)
    saved_files = {(s["file_path"], s["block_size"], s["offset"]) for s in (moved, *waiting)}
    files = {(s["file_path"], s["block_size"], s["offset"]) for s in (now, *now["waiting"])}
    if files != saved_files:
        names = ", ".join(sorted({Path(path).name for path, *_ in files ^ saved_files}))
        raise UserError(
            f"cannot resume the data: the chunks in {folder} are not those of the checkpoint "
            f"(differing: {names}); restore them, or begin a new run"
        )
    _check_position(moved)
    return ChunksState(**moved, waiting=waiting)


def _check_position(state: JSONLState) -> None:
    """A position lies after a line; where it does not, the file is another one."""
    if state["position"] == 0:
        return
    with open(state["file_path"], "rb") as file:
        file.seek(state["position"] - 1)
        byte_before = file.read(1)
        at_end = not file.read(1)
    if not byte_before or (byte_before != b"\n" and not at_end):
        raise UserError(
            f"cannot resume the data: {state['file_path']} has no line that ends at byte "
            f"{state['position']}, so it has changed; restore it, or begin a new run"
        )
