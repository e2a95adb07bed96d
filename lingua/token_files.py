"""Chunks that were tokenized ahead of time, read through memory maps instead of line by line.

Beside `x.chunk.00.jsonl`, of N documents, lie

    x.chunk.00.tokens         the token ids of all documents, end to end, uint16 or uint32
    x.chunk.00.tokens.index   (N, 2) int64: where the line of a document ends, in bytes, and where
                              its tokens do
    x.chunk.00.tokens.json    what they were made of and with; written last, then all is there
    x.chunk.00.tokens.begun   the same while they are being made

A place in such a chunk is still a byte of the .jsonl file. So the states are those of reading
lines, and a run may go on with or without these files: the stream is the same.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lingua.args import UserError, write_atomic
from lingua.jsonl import JSONLState, document_text, own_lines, parse_line
from lingua.tokenizer import Tokenizer, declared_specials, find_tokenizer_file

if TYPE_CHECKING:
    import numpy as np

INDEX_ROW = 16  # bytes: two int64
COMMIT_BYTES = 64 * 2**20  # of a chunk between two waits for the disk
MAKE_THEM = "python setup/tokenize_data.py with the run's options makes them"


@dataclass(frozen=True)
class TokenRecipe:
    """What tokens follow from, beside the text."""

    tokenizer: str  # data.tokenizer.name
    tokenizer_sha256: str | None  # of its file; None where it has none
    specials: dict[str, str] | None  # bos and eos, where a file beside the tokenizer's names them
    add_bos: bool
    add_eos: bool

    @classmethod
    def of(cls, name: str, path: str | None, add_bos: bool, add_eos: bool) -> TokenRecipe:
        file = find_tokenizer_file(name, path)
        digest = None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return cls(name, digest, declared_specials(name, file), add_bos, add_eos)


@dataclass(frozen=True)
class TokenFiles:
    chunk: Path  # x.chunk.00.jsonl

    @property
    def tokens(self) -> Path:
        return self.chunk.with_suffix(".tokens")

    @property
    def index(self) -> Path:
        return self.chunk.with_suffix(".tokens.index")

    @property
    def facts(self) -> Path:
        return self.chunk.with_suffix(".tokens.json")

    @property
    def begun(self) -> Path:
        return self.chunk.with_suffix(".tokens.begun")

    def made_with(self, recipe: TokenRecipe) -> dict[str, Any]:
        return {**asdict(recipe), "chunk_bytes": self.chunk.stat().st_size}

    def find_problem(self, recipe: TokenRecipe) -> str | None:
        """Why these files are not this chunk's tokens by `recipe`."""
        if not self.facts.exists():
            return f"{self.facts.name} is missing"
        facts = _read_json(self.facts)
        if not isinstance(facts, dict):
            return f"{self.facts.name} is damaged"
        for key, value in self.made_with(recipe).items():
            if facts.get(key) != value:
                return f"made with {key}={facts.get(key)}, and it is {value} now"
        sizes = {self.tokens: facts["token_bytes"], self.index: INDEX_ROW * facts["documents"]}
        for file, size in sizes.items():
            if not file.is_file() or file.stat().st_size != size:
                return f"{file.name} is missing or cut off"
        return None


def write_token_files(chunk: Path, tokenizer: Tokenizer, recipe: TokenRecipe) -> dict[str, Any]:
    """Tokenize a chunk; what its .tokens.json says.

    Files that were begun with the same recipe are gone on with, others are replaced.
    """
    import numpy as np

    files = TokenFiles(chunk)
    files.facts.unlink(missing_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.n_words <= 2**16 else np.uint32)
    made_with = files.made_with(recipe)
    with _TokenWriter(files, dtype, made_with) as out:
        committed = out.end_byte
        for line, end in own_lines(str(chunk), out.end_byte, 1, 0):
            text = document_text(parse_line(line, str(chunk), end))
            out.add(tokenizer.encode(text, recipe.add_bos, recipe.add_eos), end)
            if end - committed >= COMMIT_BYTES:
                out.commit()
                committed = end
        out.commit()
    if out.n_tokens == 0:
        raise UserError(f"{chunk} has no document with a token: remove it")
    facts = {
        **made_with,
        "documents": out.n_documents,
        "tokens": out.n_tokens,
        "dtype": dtype.name,
        "token_bytes": out.n_tokens * dtype.itemsize,
    }
    write_atomic(files.facts, json.dumps(facts, indent=2) + "\n")
    files.begun.unlink()
    return facts


class _TokenWriter:
    """Appends documents to the files of a chunk, which one process at a time may do.

    The index is written after the tokens that it tells of have reached the disk, so that it says,
    whatever happens, how much of both is good.
    """

    def __init__(self, files: TokenFiles, dtype: np.dtype, made_with: dict[str, Any]):
        self.dtype = dtype
        self.n_documents = self.n_tokens = self.end_byte = 0
        self._ends = array("q")  # of documents since the last commit: bytes, tokens
        with ExitStack() as opening:
            self._tokens = opening.enter_context(open(files.tokens, "ab", buffering=2**20))
            _hold(self._tokens, files.tokens)
            self._index = opening.enter_context(open(files.index, "ab"))
            if _read_json(files.begun) == made_with:
                self._go_on(files)
            self._tokens.truncate(self.n_tokens * dtype.itemsize)
            self._index.truncate(self.n_documents * INDEX_ROW)
            write_atomic(files.begun, json.dumps(made_with))
            self._stack = opening.pop_all()

    def _go_on(self, files: TokenFiles) -> None:
        import numpy as np

        n_documents = self._index.tell() // INDEX_ROW
        if n_documents == 0:
            return
        ends_N2 = np.memmap(files.index, np.int64, mode="r", shape=(n_documents, 2))
        end_byte, n_tokens = map(int, ends_N2[-1])
        if n_tokens * self.dtype.itemsize <= self._tokens.tell():
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

    def __enter__(self) -> _TokenWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()


def _hold(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel's: it goes with the process
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # others: a file system without locks
            raise UserError(f"{path}: another process writes it; wait for it, or stop it") from None


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def check_token_files(chunks: list[str], recipe: TokenRecipe) -> None:
    """UserError for the first chunk whose token files are not there, or are of something else."""
    for chunk in chunks:
        problem = TokenFiles(Path(chunk)).find_problem(recipe)
        if problem is not None:
            raise UserError(f"data.pretokenized=true: {chunk}: {problem}; {MAKE_THEM}")


def read_tokens(
    file_path: str, position: int, block_size: int, offset: int, current_iter: int
) -> Iterator[tuple[np.ndarray, JSONLState]]:
    """As `jsonl.read_jsonl`, with the token ids of each document for the document."""
    with ExitStack() as stack:
        tokens, ends_N2 = _open_maps(TokenFiles(Path(file_path)), stack)
        first = offset
        if position > 0:
            ends_at = ends_N2.array[:, 0]
            first = block_size + _own_line(ends_at, position, file_path, block_size, offset)
        for number in range(first, len(ends_N2.array), block_size):
            ends_N2.check()
            end_byte, end_token = map(int, ends_N2.array[number])
            begin_token = int(ends_N2.array[number - 1, 1]) if number else 0
            tokens.check()
            yield (
                tokens.array[begin_token:end_token],
                JSONLState(
                    file_path=file_path,
                    position=end_byte,
                    block_size=block_size,
                    offset=offset,
                    current_iter=current_iter,
                ),
            )


def _own_line(
    ends_N: np.ndarray, position: int, file_path: str, block_size: int, offset: int
) -> int:
    """The number of this rank's line that ends at byte `position`."""
    number = int(ends_N.searchsorted(position))
    if number == len(ends_N) or ends_N[number] != position or number % block_size != offset:
        raise UserError(
            f"cannot resume the data: {file_path} has no line of this rank that ends at byte "
            f"{position}, so it has changed; restore it, or begin a new run"
        )
    return number


def _open_maps(files: TokenFiles, stack: ExitStack) -> tuple[_Map, _Map]:
    """The tokens, and the index (N, 2), as their facts say; closed with `stack`."""
    facts = _read_json(files.facts)
    if not isinstance(facts, dict):
        raise _cannot_be_read(f"{files.facts} is missing or damaged")
    n_documents, dtype = facts["documents"], facts["dtype"]
    return (
        _Map(files.tokens, dtype, (facts["tokens"],), stack),
        _Map(files.index, "int64", (n_documents, 2), stack),
    )


class _Map:
    """A file as an array. Behind the end of one that was cut, a map reads zeros or, pages away,
    ends the process: call `check` before a look."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...], stack: ExitStack):
        import numpy as np

        self._path, self._n_bytes = path, np.dtype(dtype).itemsize * math.prod(shape)
        try:
            self._fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, self._fd)
            self.check()
            self.array = np.memmap(path, dtype, mode="r", shape=shape)
        except OSError as error:
            raise _cannot_be_read(f"{path} cannot be read ({error.strerror})") from None

    def check(self) -> None:
        if os.fstat(self._fd).st_size < self._n_bytes:
            raise _cannot_be_read(f"{self._path} was cut off")


def _cannot_be_read(problem: str) -> UserError:
    return UserError(f"data.pretokenized=true: {problem}; {MAKE_THEM}")
