"""Chunks that were tokenized ahead of time, read through memory maps instead of line by line.

Beside `x.chunk.00.jsonl`, of N documents, lie

    x.chunk.00.tokens         the token ids of all documents, end to end, uint16 or uint32
    x.chunk.00.tokens.index   (N, 2) int64: where the line of a document ends, in bytes, and where
                              its tokens do
    x.chunk.00.tokens.json    what they were made of and with; written last, then all is there

A place in such a chunk is still a byte of the .jsonl file. So the states are those of reading
lines, and a run may go on with or without these files: the stream is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingua.args import UserError, open_atomic, write_atomic
from lingua.jsonl import JSONLState, document_text, own_lines, parse_line
from lingua.tokenizer import Tokenizer, find_tokenizer_file

if TYPE_CHECKING:
    import numpy as np

MAKE_THEM = "python setup/tokenize_data.py with the run's options makes them"


@dataclass(frozen=True)
class TokenRecipe:
    """What tokens follow from, beside the text."""

    tokenizer: str  # data.tokenizer.name
    tokenizer_sha256: str | None  # of its file; None where it has none
    add_bos: bool
    add_eos: bool

    @classmethod
    def of(cls, name: str, path: str | None, add_bos: bool, add_eos: bool) -> TokenRecipe:
        file = find_tokenizer_file(name, path)
        digest = None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return cls(name, digest, add_bos, add_eos)


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

    def find_problem(self, recipe: TokenRecipe) -> str | None:
        """Why these files are not this chunk's tokens by `recipe`."""
        try:
            facts = json.loads(self.facts.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return f"{self.facts.name} is missing"
        except ValueError:
            return f"{self.facts.name} is damaged"
        wanted = {**asdict(recipe), "chunk_bytes": self.chunk.stat().st_size}
        for key, value in wanted.items():
            if facts.get(key) != value:
                return f"made with {key}={facts.get(key)}, and it is {value} now"
        sizes = {self.tokens: facts["token_bytes"], self.index: 16 * facts["documents"]}
        for file, size in sizes.items():
            if not file.is_file() or file.stat().st_size != size:
                return f"{file.name} is missing or cut off"
        return None


def write_token_files(chunk: Path, tokenizer: Tokenizer, recipe: TokenRecipe) -> dict[str, Any]:
    """Tokenize a chunk; what its .tokens.json says. Files of before are replaced."""
    import numpy as np

    files = TokenFiles(chunk)
    files.facts.unlink(missing_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.n_words <= 2**16 else np.uint32)
    ends: list[tuple[int, int]] = []
    n_tokens = 0
    with open_atomic(files.tokens) as out:
        for line, end in own_lines(str(chunk), 0, 1, 0):
            text = document_text(parse_line(line, str(chunk), end))
            tokens = tokenizer.encode(text, recipe.add_bos, recipe.add_eos)
            out.write(np.asarray(tokens, dtype=dtype).tobytes())
            n_tokens += len(tokens)
            ends.append((end, n_tokens))
    if n_tokens == 0:
        raise UserError(f"{chunk} has no document with a token: remove it")
    write_atomic(files.index, np.asarray(ends, dtype=np.int64).tobytes())
    facts = {
        **asdict(recipe),
        "chunk_bytes": chunk.stat().st_size,
        "documents": len(ends),
        "tokens": n_tokens,
        "dtype": dtype.name,
        "token_bytes": n_tokens * dtype.itemsize,
    }
    write_atomic(files.facts, json.dumps(facts, indent=2) + "\n")
    return facts


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
    import numpy as np

    files = TokenFiles(Path(file_path))
    dtype = json.loads(files.facts.read_text(encoding="utf-8"))["dtype"]
    tokens = np.memmap(files.tokens, dtype=dtype, mode="r")
    ends_N2 = np.memmap(files.index, dtype=np.int64, mode="r").reshape(-1, 2)
    first = offset
    if position > 0:
        last = int(np.searchsorted(ends_N2[:, 0], position))
        if last == len(ends_N2) or ends_N2[last, 0] != position or last % block_size != offset:
            raise UserError(
                f"cannot resume the data: {file_path} has no line of this rank that ends at byte "
                f"{position}, so it has changed; restore it, or begin a new run"
            )
        first = last + block_size
    for number in range(first, len(ends_N2), block_size):
        end_byte, end_token = map(int, ends_N2[number])
        begin_token = int(ends_N2[number - 1, 1]) if number else 0
        yield (
            tokens[begin_token:end_token],
            JSONLState(
                file_path=file_path,
                position=end_byte,
                block_size=block_size,
                offset=offset,
                current_iter=current_iter,
            ),
        )
