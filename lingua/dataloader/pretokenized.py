"""Chunks that were tokenized ahead of time, read through memory maps instead of line by line.

Beside `x.chunk.00.jsonl`, of N documents, lie

    x.chunk.00.tokens         the token ids of all documents, end to end, uint16 or uint32
    x.chunk.00.tokens.index   (N, 2) int64: where the line of a document ends, in bytes, and where
                              its tokens do
    x.chunk.00.tokens.json    what they were made of and with; written last, then all is there
    x.chunk.00.tokens.begun   the same while they are being made

A place in such a chunk is still a byte of the .jsonl file. So the states are those of reading
lines, and a run may go on with or without these files: the stream is the same.

Before a run reads them they are held to the recipe, to their sizes and to the chunk's fingerprint,
which sees a chunk of another length and an edit all through it, but not, in one above 4 MiB, a few
bytes exchanged between its samples (`fingerprint`). Each document's row of the index is
looked at when it is read. Of token ids only those outside of the vocabulary are told of, in
training; other bytes that a disk changed are not seen.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import struct
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lingua.dataloader.jsonl import JSONLState, document_text, own_lines, parse_line
from lingua.errors import UserError
from lingua.files.atomic import write_atomic
from lingua.tokenizer import Tokenizer, declared_specials, find_tokenizer_file

if TYPE_CHECKING:
    import numpy as np

INDEX_ROW = 16  # bytes: two int64
ITEM_BYTES = {"uint16": 2, "uint32": 4}  # what token ids are written as
COUNTS = ("documents", "tokens", "token_bytes")  # of a .tokens.json
FINGERPRINT = "chunk_fingerprint"  # its key there
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
        return {**self._seen_at_once(recipe), FINGERPRINT: fingerprint(self.chunk)}

    def _seen_at_once(self, recipe: TokenRecipe) -> dict[str, Any]:
        return {**asdict(recipe), "chunk_bytes": self.chunk.stat().st_size}

    def find_problem(self, recipe: TokenRecipe) -> str | None:
        """Why these files are not this chunk's tokens by `recipe`."""
        try:
            facts = _read_facts(self.facts)
        except ValueError as error:
            return str(error)
        for key, value in self._seen_at_once(recipe).items():
            if key not in facts:
                return f"{self.facts.name} is damaged (it has no {key})"
            if facts[key] != value:
                return f"{self.facts.name}: made with {key}={facts[key]}, and it is {value} now"
        return self._find_damage(facts) or self._find_change_of_text(facts)

    def _find_damage(self, facts: dict[str, Any]) -> str | None:
        sizes = {self.tokens: facts["token_bytes"], self.index: INDEX_ROW * facts["documents"]}
        for file, size in sizes.items():
            if not file.is_file() or file.stat().st_size != size:
                return f"{file.name} is missing or cut off"
        try:
            end_byte, n_tokens = _last_row(self.index)
        except OSError as error:
            return f"{self.index.name} cannot be read ({error.strerror})"
        if not 0 < end_byte <= facts["chunk_bytes"] or n_tokens != facts["tokens"]:
            return f"{self.index.name} is damaged (its last row)"
        return None

    def _find_change_of_text(self, facts: dict[str, Any]) -> str | None:
        """The last question, as it costs the most."""
        if FINGERPRINT not in facts:
            return (
                f"{self.facts.name} has no {FINGERPRINT}, as an older version wrote it, so that a "
                "change of the text would not be seen (data.pretokenized=false reads the text, in "
                "the same order)"
            )
        if facts[FINGERPRINT] != fingerprint(self.chunk):
            return f"the text has changed since {self.facts.name} was written"
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
    if fingerprint(chunk) != made_with[FINGERPRINT]:
        raise UserError(f"{chunk} changed while it was read; run the same command again")
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
                self._go_on(files, made_with["chunk_bytes"])
            self._tokens.truncate(self.n_tokens * dtype.itemsize)
            self._index.truncate(self.n_documents * INDEX_ROW)
            write_atomic(files.begun, json.dumps(made_with))
            self._stack = opening.pop_all()

    def _go_on(self, files: TokenFiles, chunk_bytes: int) -> None:
        n_documents = self._index.tell() // INDEX_ROW
        if n_documents == 0:
            return
        end_byte, n_tokens = _last_row(files.index)
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
    except (FileNotFoundError, ValueError, RecursionError):  # the last: brackets without end
        return None


def _read_facts(file: Path) -> dict[str, Any]:
    """A .tokens.json whose numbers can be relied on; else a ValueError says what is wrong."""
    if not file.exists():
        raise ValueError(f"{file.name} is missing")
    try:
        facts = _read_json(file)
    except OSError as error:
        raise ValueError(f"{file.name} cannot be read ({error.strerror})") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{file.name} is damaged")
    item_bytes = ITEM_BYTES.get(str(facts.get("dtype")))
    if item_bytes is None:
        raise ValueError(f"{file.name} is damaged (dtype={facts.get('dtype')})")
    for key in COUNTS:
        if type(facts.get(key)) is not int or facts[key] < 1:
            raise ValueError(f"{file.name} is damaged ({key}={facts.get(key)})")
    if facts["token_bytes"] != facts["tokens"] * item_bytes:
        raise ValueError(f"{file.name} is damaged (token_bytes={facts['token_bytes']})")
    return facts


def _last_row(index: Path) -> tuple[int, int]:
    """Where the last document of an index that has one ends: in bytes, and in tokens."""
    with open(index, "rb") as file:
        n_whole = file.seek(0, os.SEEK_END) // INDEX_ROW
        file.seek((n_whole - 1) * INDEX_ROW)
        return struct.unpack("=qq", file.read(INDEX_ROW))


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
    files = TokenFiles(Path(file_path))
    with ExitStack() as stack:
        tokens, ends_N2 = _open_maps(files, stack)
        first, n_tokens = offset, len(tokens.array)
        last_byte = int(ends_N2.array[-1, 0])  # looked at before the run began
        if position > 0:
            ends_at = ends_N2.array[:, 0]
            first = block_size + _own_line(ends_at, position, file_path, block_size, offset)
        for number in range(first, len(ends_N2.array), block_size):
            ends_N2.check()
            begin_byte, begin_token = ends_N2.array[number - 1].tolist() if number else (0, 0)
            end_byte, end_token = ends_N2.array[number].tolist()
            if not (
                0 <= begin_byte < end_byte <= last_byte
                and 0 <= begin_token <= end_token <= n_tokens
            ):
                # deleted, as setup/tokenize_data.py does not look into files of the right size
                raise _cannot_be_read(f"{files.index} is damaged (row {number}): delete it")
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
            f"{position}, so it or its token files have changed; restore them, or begin a new run"
        )
    return number


def _open_maps(files: TokenFiles, stack: ExitStack) -> tuple[_Map, _Map]:
    """The tokens, and the index (N, 2), as their facts say; closed with `stack`."""
    try:
        facts = _read_facts(files.facts)
    except ValueError as error:
        raise _cannot_be_read(f"{files.chunk}: {error}") from None
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


N_BLOCKS = 64  # of a file: the first, the last, and between them at equal distances


BLOCK_BYTES = 64 * 2**10


def fingerprint(file: Path) -> str:
    """sha256, in hex, of a file's size and of its samples."""
    try:
        with open(file, "rb", buffering=0) as opened:
            size = opened.seek(0, 2)
            digest = hashlib.sha256(f"{size} bytes\n".encode())
            for begin in _block_begins(size):
                opened.seek(begin)
                digest.update(opened.read(BLOCK_BYTES))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); restore it") from None
    return digest.hexdigest()


def _block_begins(size: int) -> Iterator[int]:
    if size <= N_BLOCKS * BLOCK_BYTES:
        yield from range(0, size, BLOCK_BYTES)
        return
    for i in range(N_BLOCKS):
        yield (size - BLOCK_BYTES) * i // (N_BLOCKS - 1)
