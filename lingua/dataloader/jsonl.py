"""Read JSONL files, and share their lines among ranks.

A source is a folder with `*.chunk.*.jsonl` for training and `*.val.jsonl` for evaluation. Each line
is a JSON object with a string under `text` or, if that is missing or null, under `content`. Blank
lines and the byte order mark of UTF-8 are ignored.

`world` ranks share the chunks, sorted by name, as follows:
1. Each full round of `world` chunks gives every rank one whole chunk.
2. The remaining n_chunks % world chunks and the ranks are split into gcd(remaining, world) groups.
   The ranks of a group read the lines of its chunks round-robin.
So any number of chunks works with any number of ranks, and all ranks together read each line once.
"""

from __future__ import annotations

import codecs
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any, TypedDict

from lingua.errors import UserError
from lingua.files.listing import link_target, list_files
from lingua.tokenizer import well_formed

TRAIN_PATTERN = "*.chunk.*.jsonl"
VAL_PATTERN = "*.val.jsonl"
CHECKED_BYTES = 2**16  # at the start of a file, before a run


class JSONLState(TypedDict):
    """A position in a file. The rank reads the lines with line % block_size == offset."""

    file_path: str
    position: int  # the byte after the last line that was yielded
    block_size: int
    offset: int
    current_iter: int  # completed passes over this file


class ChunksState(JSONLState):
    """The position in the current chunk, and the rank's other chunks."""

    waiting: list[JSONLState]  # next one first


ReadFile = Callable[..., Iterator[tuple[Any, JSONLState]]]  # takes the fields of a JSONLState


def jsonl_state(
    file_path: str, position: int, block_size: int, offset: int, current_iter: int
) -> JSONLState:
    return JSONLState(
        file_path=file_path,
        position=position,
        block_size=block_size,
        offset=offset,
        current_iter=current_iter,
    )


def read_jsonl(
    file_path: str, position: int, block_size: int, offset: int, current_iter: int
) -> Iterator[tuple[dict[str, Any], JSONLState]]:
    """Yield this rank's documents of one file, once, starting at `position`."""
    for line, end in own_lines(file_path, position, block_size, offset):
        document = parse_line(line, file_path, end)
        yield document, jsonl_state(file_path, end, block_size, offset, current_iter)


def loop_on_jsonl(
    file_path: str,
    position: int,
    block_size: int,
    offset: int,
    current_iter: int,
    waiting: list[JSONLState] | None = None,
    read: ReadFile = read_jsonl,
) -> Iterator[tuple[Any, ChunksState]]:
    """Yield this rank's documents forever. A finished file moves to the end of `waiting`.

    `read` reads one file: `read_jsonl`, or `read_tokens` of pretokenized.py.
    """
    share = jsonl_state(file_path, position, block_size, offset, current_iter)
    queue = list(waiting or [])
    while True:
        found = share["position"] > 0
        for document, state in read(**share):
            found = True
            yield document, ChunksState(**state, waiting=queue)  # `queue` is never mutated
        if not found:  # lines were counted before the start, so the file has changed since
            raise UserError(f"{share['file_path']} has no line for this rank: remove it")
        done = JSONLState(**{**share, "position": 0, "current_iter": share["current_iter"] + 1})
        share, *queue = [*queue, done]


def own_lines(
    file_path: str, position: int, block_size: int, offset: int
) -> Iterator[tuple[bytes, int]]:
    """Yield this rank's non-blank lines, each with the byte position after it."""
    number = offset + 1 if position > 0 else 0  # a saved position follows one of this rank's lines
    try:
        with open(file_path, "rb") as file:
            file.seek(position)
            for line in file:
                position += len(line)
                if is_blank(line):
                    continue
                if number % block_size == offset:
                    yield line, position
                number += 1
    except OSError as error:
        raise UserError(f"{file_path}: cannot be read ({error.strerror}); restore it") from None


def is_blank(line: bytes) -> bool:
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def parse_line(line: bytes, file_path: str, end: int) -> dict[str, Any]:
    """Parse a document; `end`, the byte position after it, is used to find its line number."""
    try:
        document = parse_object(line)
        if not isinstance(find_text(document), str):
            raise ValueError(f'no string under "text" or "content" (found: {name_keys(document)})')
    except ValueError as error:
        raise line_error(file_path, end, str(error)) from None
    return document


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse a JSON object; raise ValueError for anything else."""
    try:
        document = json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except ValueError as error:
        raise ValueError(f"not JSON in UTF-8: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"a line must be a JSON object, got {type(document).__name__}")
    return document


def name_keys(document: dict[str, Any]) -> str:
    keys = sorted(document)[:10]
    return ", ".join(f"{k!r} = null" if document[k] is None else repr(k) for k in keys) or "no key"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a repeated key: `json` would silently drop all but its last value."""
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key is given twice in an object")
    return document


def find_text(document: dict[str, Any]) -> Any:
    """Return the value of `text` or, if that is missing or null, of `content`."""
    text = document.get("text")
    return document.get("content") if text is None else text


def document_text(document: dict[str, Any]) -> str:
    return well_formed(find_text(document))


def line_error(file_path: str, end: int, problem: str) -> UserError:
    """Return an error that names the line that ends at byte `end`."""
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
    """Return the chunks of a source, sorted by name; check that `world_size` ranks can share them.

    Reads at most 64 kB, or `world_size` lines, of a chunk. Every rank does the same checks, so all
    ranks raise the same UserError, also for a match that is no readable file.
    """
    folder = Path(dataset_path)
    if not os.path.isdir(folder):
        advice = "a source is a folder in data.root_dir"
        if folder.is_file():
            advice = how_to_prepare(folder)
        raise UserError(f"data.sources: no folder {folder}{link_target(folder)}; {advice}")
    chunks = list_files(folder, file_pattern)
    if not chunks:
        raise UserError(
            f"data.sources: {folder} has no file named {file_pattern}; {how_to_prepare(folder)}"
        )
    n_whole = len(chunks) - len(chunks) % world_size
    n_sharing = world_size // math.gcd(len(chunks), world_size)
    for i, chunk in enumerate(chunks):
        check_chunk(chunk, n_readers=1 if i < n_whole else n_sharing)
    return chunks


def how_to_prepare(path: str | os.PathLike) -> str:
    return (
        f"to make a source of its texts, run python -m apps.LT2.scripts.prepare {quote(str(path))}"
    )


def check_chunk(chunk: str, n_readers: int) -> None:
    """Check the lines in the first 64 kB, which is all of a small file, and count `n_readers`."""
    n_lines = 0
    for line, end in own_lines(chunk, 0, 1, 0):
        if n_lines == 0 or end <= CHECKED_BYTES:
            parse_line(line, chunk, end)
        elif n_lines >= n_readers:
            break
        n_lines += 1
    if n_lines == 0:
        raise UserError(f"{chunk} is empty: remove it")
    if n_lines < n_readers:
        raise UserError(
            f"{chunk} has {n_lines} lines but {n_readers} ranks share it, and each needs one: "
            "use fewer ranks or larger chunks"
        )


def distribute_data_to_rank(
    dataset_path: str, rank: int, world_size: int, file_pattern: str = TRAIN_PATTERN
) -> ChunksState:
    """Return where `rank` starts to read a source, by the rule in the module docstring."""
    chunks = find_and_sanitize_chunks(dataset_path, world_size, file_pattern)
    n_whole = len(chunks) - len(chunks) % world_size
    whole, shared = chunks[:n_whole], chunks[n_whole:]
    shares = [(chunk, 1, 0) for chunk in whole[rank::world_size]]
    if shared:
        n_groups = math.gcd(len(shared), world_size)
        ranks_per_group, chunks_per_group = world_size // n_groups, len(shared) // n_groups
        group, offset = divmod(rank, ranks_per_group)
        own = shared[group * chunks_per_group : (group + 1) * chunks_per_group]
        shares += [(chunk, ranks_per_group, offset) for chunk in own]
    first, *rest = (jsonl_state(chunk, 0, size, offset, 0) for chunk, size, offset in shares)
    return ChunksState(**first, waiting=rest)


def find_val_files(root_dir: str, sources: Iterable[str]) -> list[str]:
    """Return all `*.val.jsonl` of these sources: sources in the order given, files by name.

    UserError if a match is not a readable file, or if its first line is not a document.
    """
    files = [f for source in sources for f in list_files(Path(root_dir, source), VAL_PATTERN)]
    for file in files:
        check_chunk(file, n_readers=1)
    return files


def iter_val_documents(
    root_dir: str, sources: Iterable[str], rank: int = 0, world_size: int = 1
) -> Iterator[str]:
    """Iterate once over this rank's validation texts; ranks take documents round-robin."""
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
