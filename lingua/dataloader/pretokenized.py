"""Token ids made ahead of time, read instead of the lines of a chunk.

For `x.chunk.00.jsonl` with N documents, the same folder has these files:

    x.chunk.00.tokens         token ids of all documents, end to end, uint16 or uint32
    x.chunk.00.tokens.index   (N, 2) int64: where each document ends, in bytes of the .jsonl file
                              and in tokens
    x.chunk.00.tokens.json    recipe, counts, and size, mtime and sha256 of the chunk; written last
    x.chunk.00.tokens.begun   recipe, size and mtime; exists while the files are incomplete

A position in such a chunk is still a byte of the .jsonl file. So the states equal the states of
`read_jsonl`, and a run can resume with or without these files.

A run compares the recipe and the chunk's size and mtime before it starts. If only the mtime
differs, as in a copied folder, it compares the chunk's sha256. Files of older versions have no
sha256: they are accepted if the chunk is older than they are.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lingua.dataloader.args import DataArgs
from lingua.dataloader.jsonl import JSONLState, document_text, jsonl_state, own_lines, parse_line
from lingua.errors import UserError
from lingua.files.atomic import write_atomic
from lingua.files.listing import file_sha256, find_file_problem
from lingua.tokenizer import Tokenizer, declared_specials, find_tokenizer_file

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

INDEX_ROW = 16  # bytes: two int64
ITEM_BYTES = {"uint16": 2, "uint32": 4}  # dtypes of token ids
COMMIT_BYTES = 64 * 2**20  # of a chunk, between two calls of fsync


@dataclass(frozen=True)
class TokenRecipe:
    """What determines the tokens, apart from the text."""

    tokenizer: str  # data.tokenizer.name
    tokenizer_sha256: str | None  # None if it has no file
    specials: dict[str, str | int] | None  # bos and eos, if declared next to tokenizer.json
    add_bos: bool
    add_eos: bool

    @classmethod
    def of(cls, args: DataArgs) -> TokenRecipe:
        name = args.tokenizer.name
        file = find_tokenizer_file(name, args.tokenizer.path)
        digest = None if file is None else file_sha256(file)
        return cls(name, digest, declared_specials(name, file), args.add_bos, args.add_eos)


class TokenFiles:
    """The token files of `chunk`, x.chunk.00.jsonl."""

    def __init__(self, chunk: Path):
        self.chunk = chunk
        self.tokens = chunk.with_suffix(".tokens")
        self.index = chunk.with_suffix(".tokens.index")
        self.facts = chunk.with_suffix(".tokens.json")
        self.unfinished = chunk.with_suffix(".tokens.begun")

    def made_from(self, recipe: TokenRecipe) -> dict[str, Any]:
        stat = self.chunk.stat()
        chunk = {"chunk_bytes": stat.st_size, "chunk_mtime_ns": stat.st_mtime_ns}
        return asdict(recipe) | chunk

    def find_problem(self, recipe: TokenRecipe, may_hash: bool = True) -> str | None:
        """Return why these files are not the chunk's tokens by `recipe`, or None.

        `may_hash`: compare the chunk's sha256 if its mtime has changed.
        """
        for file in (self.facts, self.tokens, self.index):
            if problem := find_file_problem(file):
                return problem
        now = self.made_from(recipe)
        mtime_ns = now.pop("chunk_mtime_ns")
        try:
            facts = json.loads(self.facts.read_bytes())
            for key, value in now.items():
                if facts[key] != value:
                    return f"{self.facts.name} was made with {key}={facts[key]}, now it is {value}"
            sizes = {
                self.tokens: facts["tokens"] * ITEM_BYTES[facts["dtype"]],
                self.index: facts["documents"] * INDEX_ROW,
            }
        except (ValueError, KeyError, TypeError):
            return f"{self.facts.name} is damaged"
        for file, size in sizes.items():
            if file.stat().st_size != size:
                return f"{file.name} has another size than when it was written"
        if "chunk_sha256" not in facts:
            if mtime_ns > self.facts.stat().st_mtime_ns:
                return f"{self.facts.name} has no chunk_sha256 and is older than the chunk"
        elif mtime_ns != facts["chunk_mtime_ns"] and may_hash:
            logger.info("%s: mtime has changed; comparing its sha256", self.chunk)
            if file_sha256(self.chunk) != facts["chunk_sha256"]:
                return f"the text has changed since {self.facts.name} was written"
        return None


def check_token_files(chunks: Iterable[str], recipe: TokenRecipe, may_hash: bool) -> None:
    """Raise UserError for the first chunk whose token files are missing or don't fit."""
    for chunk in chunks:
        problem = TokenFiles(Path(chunk)).find_problem(recipe, may_hash)
        if problem is not None:
            raise _unusable(f"{chunk}: {problem}")


def _unusable(problem: str) -> UserError:
    return UserError(
        f"data.pretokenized=true: {problem}; run python setup/tokenize_data.py with the run's "
        "options, or set data.pretokenized=false"
    )


# ---- write


def write_token_files(chunk: Path, tokenizer: Tokenizer, recipe: TokenRecipe) -> dict[str, Any]:
    """Tokenize a chunk and return the contents of its .tokens.json.

    Resumes incomplete files that were started with the same recipe, size and mtime.
    """
    import numpy as np

    files = TokenFiles(chunk)
    files.facts.unlink(missing_ok=True)
    for file in (files.tokens, files.index):
        if file.exists() and not file.is_file():
            raise UserError(f"{find_file_problem(file)}: remove it")
    dtype = np.dtype(np.uint16 if tokenizer.n_words <= 2**16 else np.uint32)
    made_from = files.made_from(recipe)
    with open(files.tokens, "ab", buffering=2**20) as tokens, open(files.index, "ab") as index:
        out = _TokenWriter(files, dtype, made_from, tokens, index)
        committed = out.end_byte
        for line, end in own_lines(str(chunk), out.end_byte, 1, 0):
            text = document_text(parse_line(line, str(chunk), end))
            out.add(tokenizer.encode(text, recipe.add_bos, recipe.add_eos), end)
            if end - committed >= COMMIT_BYTES:
                out.commit()
                committed = end
        out.commit()
        facts = {
            **made_from,
            "chunk_sha256": file_sha256(chunk),
            "documents": out.n_documents,
            "tokens": out.n_tokens,
            "dtype": dtype.name,
        }
        if files.made_from(recipe) != made_from:
            raise UserError(f"{chunk} changed while it was read; run the same command again")
        if out.n_tokens == 0:
            raise UserError(f"{chunk} has no document with a token: remove it")
        write_atomic(files.facts, json.dumps(facts, indent=2) + "\n")
        files.unfinished.unlink()
    return facts


class _TokenWriter:
    """Appends documents to the files of a chunk; one process at a time.

    Index rows are written after their tokens are on disk, so the index always describes how much
    of both files is valid.
    """

    def __init__(
        self,
        files: TokenFiles,
        dtype: np.dtype,
        made_from: dict[str, Any],
        tokens: BinaryIO,
        index: BinaryIO,
    ):
        self.dtype, self._tokens, self._index = dtype, tokens, index
        self.n_documents = self.n_tokens = self.end_byte = 0
        self._ends = array("q")  # of documents since the last commit: byte, token
        _lock(tokens)
        if files.unfinished.exists() and files.unfinished.read_text() == json.dumps(made_from):
            self._resume(files, made_from["chunk_bytes"])
        tokens.truncate(self.n_tokens * dtype.itemsize)
        index.truncate(self.n_documents * INDEX_ROW)
        write_atomic(files.unfinished, json.dumps(made_from))

    def _resume(self, files: TokenFiles, chunk_bytes: int) -> None:
        n_documents = self._index.tell() // INDEX_ROW
        if n_documents == 0:
            return
        with open(files.index, "rb") as index:
            end_byte, n_tokens = _read_row(index, n_documents - 1)
        is_within = 0 < end_byte <= chunk_bytes and n_tokens >= 0
        if is_within and n_tokens * self.dtype.itemsize <= self._tokens.tell():
            self.n_documents, self.end_byte, self.n_tokens = n_documents, end_byte, n_tokens

    def add(self, tokens: list[int], end_byte: int) -> None:
        import numpy as np

        self._tokens.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self.n_documents += 1
        self.n_tokens += len(tokens)
        self.end_byte = end_byte
        self._ends.extend((end_byte, self.n_tokens))

    def commit(self) -> None:
        self._tokens.flush()
        os.fsync(self._tokens.fileno())
        self._index.write(self._ends.tobytes())
        self._index.flush()
        os.fsync(self._index.fileno())
        del self._ends[:]


def _lock(file: BinaryIO) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # others: no locks on this file system
            raise UserError(f"{file.name}: another process writes it; wait or stop it") from None


# ---- read


def read_tokens(
    file_path: str, position: int, block_size: int, offset: int, current_iter: int
) -> Iterator[tuple[np.ndarray, JSONLState]]:
    """Yield the token ids of this rank's documents, with the states of `jsonl.read_jsonl`."""
    import numpy as np

    files = TokenFiles(Path(file_path))
    try:
        facts = json.loads(files.facts.read_bytes())
        dtype = np.dtype(facts["dtype"])
        with open(files.tokens, "rb") as tokens, open(files.index, "rb") as index:
            first = offset
            if position > 0:
                last = _find_line(index, facts["documents"], position)
                if last is None or last % block_size != offset:
                    raise UserError(
                        f"cannot resume the data: {file_path} has no line of this rank that ends "
                        f"at byte {position}, so it or its token files have changed; restore "
                        "them, or start a new run"
                    )
                first = last + block_size
            for number in range(first, facts["documents"], block_size):
                begin_byte, begin = _read_row(index, number - 1) if number else (0, 0)
                end_byte, end = _read_row(index, number)
                is_valid = begin_byte < end_byte <= facts["chunk_bytes"]
                if not (is_valid and 0 <= begin <= end <= facts["tokens"]):
                    # setup/tokenize_data.py would keep it, as its size is right
                    raise _unusable(f"{files.index} is damaged (row {number}): delete it")
                data = _read_at(tokens, begin * dtype.itemsize, (end - begin) * dtype.itemsize)
                state = jsonl_state(file_path, end_byte, block_size, offset, current_iter)
                yield np.frombuffer(data, dtype), state
    except OSError as error:
        file = error.filename or file_path
        raise _unusable(f"{file}: cannot be read ({error.strerror})") from None


def _find_line(index: BinaryIO, n_documents: int, position: int) -> int | None:
    """Return the number of the line that ends at byte `position`."""
    rows = range(n_documents)
    number = bisect_left(rows, position, key=lambda n: _read_row(index, n)[0])
    return number if number in rows and _read_row(index, number)[0] == position else None


def _read_row(index: BinaryIO, number: int) -> tuple[int, int]:
    """Return where a document ends: (byte of the chunk, token)."""
    return struct.unpack("=qq", _read_at(index, number * INDEX_ROW, INDEX_ROW))


def _read_at(file: BinaryIO, begin: int, n_bytes: int) -> bytes:
    """Read with a check: a memory map of a truncated file gives zeros or ends the process."""
    data = os.pread(file.fileno(), n_bytes, begin)
    if len(data) < n_bytes:
        raise _unusable(f"{file.name} is truncated")
    return data
