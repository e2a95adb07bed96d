"""Files of one JSON document a line, and which rank reads which of their lines.

A source is a folder with `*.chunk.*.jsonl` to train on and `*.val.jsonl` to evaluate on. A document
is an object with its text under `text`, or under `content` where there is no `text`. Blank lines
are skipped and do not count.

Which rank reads what, chunks in order of their names, `world` ranks:
1. every whole round of `world` chunks gives one whole chunk to each rank;
2. the n_chunks % world that remain are shared: they and the ranks are split into as many equal
   groups as their numbers allow (the gcd), and the ranks of a group take its lines in turn.
So any number of chunks feeds any number of ranks, and one pass over all ranks reads each line once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

from lingua.errors import UserError
from lingua.tokenizer import well_formed

TRAIN_PATTERN = "*.chunk.*.jsonl"
VAL_PATTERN = "*.val.jsonl"


class JSONLState(TypedDict):
    """A place in a file of which this rank reads the lines with line % block_size == offset."""

    file_path: str
    position: int  # the byte after the last line that was yielded
    block_size: int
    offset: int
    current_iter: int  # whole passes over this file so far


class ChunksState(JSONLState):
    """The same of the chunk being read, and the rank's other chunks."""

    waiting: list[JSONLState]  # next one first


def read_jsonl(
    file_path: str, position: int, block_size: int, offset: int, current_iter: int
) -> Iterator[tuple[dict[str, Any], JSONLState]]:
    """This rank's documents of one file, once, from `position` on."""
    for line, end in own_lines(file_path, position, block_size, offset):
        document = parse_line(line, file_path, end)
        yield (
            document,
            JSONLState(
                file_path=file_path,
                position=end,
                block_size=block_size,
                offset=offset,
                current_iter=current_iter,
            ),
        )


ReadFile = Callable[..., Iterator[tuple[Any, JSONLState]]]  # called with the keys of a JSONLState


def loop_on_jsonl(
    file_path: str,
    position: int,
    block_size: int,
    offset: int,
    current_iter: int,
    waiting: list[JSONLState] | None = None,
    read: ReadFile = read_jsonl,
) -> Iterator[tuple[Any, ChunksState]]:
    """This rank's documents without end: a file read to its end goes behind the waiting ones.

    `read` gives the documents of one file, as texts or as tokens (see token_files.py).
    """
    share = JSONLState(
        file_path=file_path,
        position=position,
        block_size=block_size,
        offset=offset,
        current_iter=current_iter,
    )
    queue = list(waiting or [])
    while True:
        found = share["position"] > 0
        for document, state in read(**share):
            found = True
            # the queue is never changed in place, so states may share it
            yield document, ChunksState(**state, waiting=queue)
        if not found:  # the checks before the start saw to it, so the file has changed since
            raise UserError(f"{share['file_path']} has no line for this rank: remove it")
        done = JSONLState(**{**share, "position": 0, "current_iter": share["current_iter"] + 1})
        share, *queue = [*queue, done]


def own_lines(
    file_path: str, position: int, block_size: int, offset: int
) -> Iterator[tuple[bytes, int]]:
    """This rank's lines that are not blank, each with the byte position after it."""
    # a position above 0 lies just after a line of ours
    number = offset + 1 if position > 0 else 0
    try:
        with open(file_path, "rb") as file:
            file.seek(position)
            for line in file:
                position += len(line)
                if not line.strip():
                    continue
                if number % block_size == offset:
                    yield line, position
                number += 1
    except OSError as error:
        raise UserError(f"{file_path}: cannot be read ({error.strerror}); restore it") from None


def parse_line(line: bytes, file_path: str, end: int) -> dict[str, Any]:
    try:
        document = parse_object(line)
        if not isinstance(document.get("text", document.get("content")), str):
            raise ValueError(f'no string under "text" or "content" (found: {name_keys(document)})')
    except ValueError as error:
        raise line_error(file_path, end, str(error)) from None
    return document


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; a ValueError says what else it is."""
    try:
        document = json.loads(line.decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or brackets without end
        raise ValueError(f"not JSON in UTF-8: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"a line must be a JSON object, got {type(document).__name__}")
    return document


def name_keys(document: dict[str, Any]) -> str:
    # quoted and cut: a key may hold anything, and as much as it likes
    return ", ".join(json.dumps(key[:30]) for key in sorted(document)[:10]) or "no key"


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two texts under one key, Python's reader would drop one in silence."""
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key is given twice in an object")
    return document


def document_text(document: dict[str, Any]) -> str:
    return well_formed(document["text"] if "text" in document else document["content"])


def line_error(file_path: str, end: int, problem: str) -> UserError:
    """Names the line that ends at byte `end`; counting the lines may take time, but only once."""
    number = position = 0
    with open(file_path, "rb") as file:
        for line in file:
            number, position = number + 1, position + len(line)
            if position >= end:
                return UserError(f"{file_path}:{number}: {problem}")
    return UserError(f"{file_path} has become shorter while it was read: {problem}")


def find_and_sanitize_chunks(
    dataset_path: str, world_size: int, file_pattern: str = TRAIN_PATTERN
) -> list[str]:
    """The chunks of a source by name, after checks that would otherwise stop a run late.

    Reads no more than the first `world_size` lines of a chunk, and the same on every rank, so that
    all ranks stop with the same message.
    """
    folder = Path(dataset_path)
    if not folder.is_dir():
        raise UserError(f"data.sources: no folder {folder} (a source is a folder in data.root_dir)")
    chunks = sorted(str(p) for p in folder.glob(file_pattern) if p.is_file())
    if not chunks:
        raise UserError(f"data.sources: {folder} has no file named {file_pattern}")
    n_whole = len(chunks) - len(chunks) % world_size
    n_sharing = world_size // math.gcd(len(chunks), world_size)
    for i, chunk in enumerate(chunks):
        check_chunk(chunk, n_readers=1 if i < n_whole else n_sharing)
    return chunks


def check_chunk(chunk: str, n_readers: int) -> None:
    lines = list(islice(own_lines(chunk, 0, 1, 0), n_readers))
    if not lines:
        raise UserError(f"{chunk} is empty: remove it")
    parse_line(lines[0][0], chunk, lines[0][1])
    if len(lines) < n_readers:
        raise UserError(
            f"{chunk} has {len(lines)} lines but {n_readers} ranks share it, and each needs one: "
            "use fewer ranks or larger chunks"
        )


def distribute_data_to_rank(
    dataset_path: str, rank: int, world_size: int, file_pattern: str = TRAIN_PATTERN
) -> ChunksState:
    """Where `rank` begins to read a source; the rule is at the top of this file."""
    chunks = find_and_sanitize_chunks(dataset_path, world_size, file_pattern)
    n_whole = len(chunks) - len(chunks) % world_size
    whole, shared = chunks[:n_whole], chunks[n_whole:]
    shares = [(chunk, 1, 0) for chunk in whole[rank::world_size]]
    if shared:
        n_groups = math.gcd(len(shared), world_size)
        ranks_a_group, chunks_a_group = world_size // n_groups, len(shared) // n_groups
        group, place = divmod(rank, ranks_a_group)
        ours = shared[group * chunks_a_group : (group + 1) * chunks_a_group]
        shares += [(chunk, ranks_a_group, place) for chunk in ours]
    first, *rest = (
        JSONLState(
            file_path=chunk, position=0, block_size=block_size, offset=offset, current_iter=0
        )
        for chunk, block_size, offset in shares
    )
    return ChunksState(**first, waiting=rest)


def find_val_files(root_dir: str, sources: Iterable[str]) -> list[str]:
    """All `*.val.jsonl` of these sources: sources in the order given, files by name."""
    return [
        str(path)
        for source in sources
        for path in sorted(Path(root_dir, source).glob(VAL_PATTERN))
        if path.is_file()
    ]


def iter_val_documents(
    root_dir: str, sources: Iterable[str], rank: int = 0, world_size: int = 1
) -> Iterator[str]:
    """The texts held out for evaluation, once, dealt to the ranks one by one."""
    sources = list(sources)
    files = find_val_files(root_dir, sources)
    if not files:
        folders = ", ".join(str(Path(root_dir, source)) for source in sources)
        raise UserError(f"no file named {VAL_PATTERN} in {folders or root_dir}")
    lines = ((file, *line) for file in files for line in own_lines(file, 0, 1, 0))
    return (
        document_text(parse_line(line, file, end))
        for file, line, end in islice(lines, rank, None, world_size)
    )
