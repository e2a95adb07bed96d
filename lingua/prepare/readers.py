"""Read the documents of a file: JSON lines, JSON arrays, text, parquet or arrow.

    for document in read_documents(Path("000_00000.parquet")): ...     {"text": ..., "id": ...}

Only the text (field `text` or, if missing or null, `content`) and the `id`, if any, are kept:
training reads nothing else.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from lingua.dataloader.jsonl import find_text, is_blank, name_keys, parse_object, unique_keys
from lingua.errors import UserError, first_line, import_optional
from lingua.files.listing import check_file
from lingua.tokenizer import well_formed

try:
    import orjson
except ImportError:  # reads the same documents at half the speed
    orjson = None

TEXT_KEYS = ("text", "content")
TEXT_TYPES = ("string", "large_string", "string_view")  # of columns
COMPRESSED = (".gz", ".zst")
PLAIN_TEXT = (".txt", ".md")
BATCH_ROWS = 1024  # of a parquet file
LONG_TEXT = 2**16  # bytes; a longer text file is cut into documents
# What precedes an item of a JSON array, and what ends the array there.
ARRAY_START = re.compile(r"\s*\[\s*"), re.compile(r"\s*\[\s*\]\s*")
ARRAY_NEXT = re.compile(r"\s*,\s*"), re.compile(r"\s*\]\s*")
WINDOW = 2**20  # characters of a JSON array that are read at a time
MAX_ITEM = 2**26  # characters of an item of a JSON array


def format_of(file: PurePath) -> str:
    """Return the suffix that names the format, without .gz or .zst."""
    return PurePath(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def check_document_file(file: Path, text_field: str | None = None) -> None:
    """Refuse a file that cannot be opened, or whose first document cannot be read."""
    is_blank_page = format_of(file) in PLAIN_TEXT and file.is_file() and not file.stat().st_size
    if not is_blank_page:
        check_file(file)
    next(read_documents(file, text_field), None)


def read_documents(file: Path, text_field: str | None = None) -> Iterator[dict[str, str]]:
    """Yield the documents in order. The text is "" if it is missing, null or blank.

    `text_field` replaces `text` and `content`. UserError that names the file, and the line if
    there is one, if it cannot be read to its end.
    """
    keys = (text_field,) if text_field else TEXT_KEYS
    with _naming_broken(file):
        match format_of(file):
            case ".parquet" | ".arrow" as kind:
                yield from _read_tables(file, kind, keys)
            case ".txt" | ".md":
                yield from _read_text(file)
            case ".json":
                with _open(file) as lines:
                    is_array = lines.peek(3)[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
                yield from _read_array(file, keys) if is_array else _read_lines(file, keys)
            case _:
                yield from _read_lines(file, keys)


# ---- tables


def _read_tables(file: Path, kind: str, keys: tuple[str, ...]) -> Iterator[dict[str, str]]:
    open_table = _open_parquet if kind == ".parquet" else _open_arrow
    with open_table(file) as (schema, read_batches):
        texts = _text_columns(file, schema, keys)
        columns = [*texts, "id"] if "id" in schema.names and "id" not in texts else texts
        for batch in read_batches(columns):
            for row in batch.to_pylist():
                yield _document(_find(row, keys), row.get("id"))


@contextmanager
def _open_parquet(file: Path) -> Iterator[tuple[Any, Any]]:
    parquet = import_optional("pyarrow.parquet", extra="data", needed_by=f"reading {file.name}")
    with parquet.ParquetFile(file) as table:
        yield table.schema_arrow, lambda columns: table.iter_batches(BATCH_ROWS, columns=columns)


@contextmanager
def _open_arrow(file: Path) -> Iterator[tuple[Any, Any]]:
    """Open a stream, as `datasets` saves it, or a file of the Arrow IPC format."""
    pyarrow = import_optional("pyarrow", extra="data", needed_by=f"reading {file.name}")
    with pyarrow.OSFile(str(file)) as source:
        if source.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(source)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            source.seek(0)
            table = batches = pyarrow.ipc.open_stream(source)
        yield table.schema, lambda columns: (batch.select(columns) for batch in batches)


def _text_columns(file: Path, schema: Any, keys: tuple[str, ...]) -> list[str]:
    """Return the column of the text, then the one that replaces its nulls, if any."""
    kinds = {name: str(schema.field(name).type) for name in keys if name in schema.names}
    if not kinds:
        raise UserError(
            f"{file} has no column {' or '.join(keys)}, but {', '.join(schema.names)}; name the "
            "column of the text with --text_field"
        )
    first = next((name for name, kind in kinds.items() if kind != "null"), keys[0])
    if kinds[first] not in TEXT_TYPES:
        raise UserError(f"{file}: the column {first} has type {kinds[first]}, not text")
    return [name for name, kind in kinds.items() if kind in TEXT_TYPES]


# ---- JSON


def _read_lines(file: Path, keys: tuple[str, ...]) -> Iterator[dict[str, str]]:
    quoted = [b'"%b"' % key.encode() for key in keys]
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if row := _parse_fast(line, keys[0], quoted[0]):
                yield _document(row[keys[0]], row.get("id"), is_well_formed=True)
            elif not is_blank(line):
                try:
                    row = parse_object(line)
                    text = _text_of(row, keys)
                except ValueError as error:
                    form = "; a .json file is an array of objects, or has one object a line"
                    advice = form if format_of(file) == ".json" else ""
                    raise UserError(f"{file}:{number}: {error}{advice}") from None
                yield _document(text, row.get("id"))


def _parse_fast(line: bytes, key: str, quoted: bytes) -> dict[str, Any] | None:
    """Parse an ordinary line with orjson. None for all others, which `parse_object` judges.

    orjson keeps the last of two equal keys, so the name of the text must occur once.
    """
    if orjson is None or line.count(quoted) != 1:
        return None
    try:
        row = orjson.loads(line)
    except ValueError:
        return None
    is_ordinary = isinstance(row, dict) and isinstance(row.get(key), str)
    return row if is_ordinary and not isinstance(row.get("id"), float) else None


def _read_array(file: Path, keys: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Read `[{...}, {...}]` in windows, as the array may be larger than memory."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    with _open(file) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig") as stream:
        buffer, at, number, is_whole = "", 0, 1, False  # number: the line in which `buffer` starts
        before, end = ARRAY_START
        while True:
            try:
                found = before.match(buffer, at)
                if found is None:
                    raise json.JSONDecodeError("Expecting ',' or ']'", buffer, at)
                row, stop = decoder.raw_decode(buffer, found.end())
            except ValueError as error:
                if is_whole and end.fullmatch(buffer, at):
                    return
                is_json = isinstance(error, json.JSONDecodeError)  # else from unique_keys
                if is_whole or not is_json or len(buffer) - at > MAX_ITEM:
                    found_at, problem = (error.pos, error.msg) if is_json else (at + 2, error)
                    place = number + buffer.count("\n", 0, found_at)
                    raise UserError(f"{file}:{place}: not a JSON array: {problem}") from None
                number += buffer.count("\n", 0, at)
                more = stream.read(max(WINDOW, len(buffer) - at))
                buffer, at, is_whole = buffer[at:] + more, 0, not more
                continue
            try:
                text = _text_of(row, keys)
            except ValueError as error:
                place = number + buffer.count("\n", 0, found.end())
                raise UserError(f"{file}:{place}: {error}") from None
            yield _document(text, row.get("id"))
            at, (before, end) = stop, ARRAY_NEXT


def _find(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return find_text(row) if keys == TEXT_KEYS else row.get(keys[0])


def _text_of(row: Any, keys: tuple[str, ...]) -> str | None:
    if not isinstance(row, dict):
        raise ValueError(f"a document must be a JSON object, got {type(row).__name__}")
    text = _find(row, keys)
    if text is None and row.keys().isdisjoint(keys):
        names = " or ".join(f'"{key}"' for key in keys)
        raise ValueError(
            f"no {names} (found: {name_keys(row)}); name the field of the text with --text_field"
        )
    if text is None or isinstance(text, str):
        return text
    raise ValueError(f"the text is {json.dumps(text)[:40]}, not a string")


# ---- text


def _read_text(file: Path) -> Iterator[dict[str, str]]:
    """Yield the whole file, or about LONG_TEXT bytes at a time, cut at blank lines.

    A part without blank lines is cut at twice that size, at a line's end or a blank.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    part, size, number = [], 0, 1
    with _open(file) as stream:
        while True:
            line = stream.readline(LONG_TEXT)
            try:
                part.append(decoder.decode(line, final=not line))
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                is_utf_16 = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                likely = "utf-16" if is_utf_16 else "latin1"
                raise UserError(
                    f"{file}:{number}: not UTF-8 (byte {byte:#x}); convert the file, for example "
                    f"with iconv -f {likely} -t utf-8"
                ) from None
            if not line:
                break
            size, number = size + len(line), number + line.endswith(b"\n")
            if size >= LONG_TEXT and (size >= 2 * LONG_TEXT or line.isspace()):
                text = "".join(part)
                cut = len(text) if line.endswith(b"\n") else text.rfind(" ") + 1 or len(text)
                yield _document(text[:cut], None)
                part, size = [text[cut:]], len(text) - cut
    if any(part):
        yield _document("".join(part), None)


def _open(file: Path) -> io.BufferedReader:
    if file.suffix == ".gz":
        return io.BufferedReader(gzip.open(file), 2**20)  # pyright: ignore[reportArgumentType]
    if file.suffix == ".zst":
        pyarrow = import_optional("pyarrow", extra="data", needed_by=f"reading {file.name}")
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), 2**20)
    return io.BufferedReader(io.FileIO(file), 2**20)


def _document(text: str | None, identity: Any, is_well_formed: bool = False) -> dict[str, str]:
    if not text or text.isspace():
        text = ""
    document = {"text": text if is_well_formed else well_formed(text)}
    if identity is not None:
        document["id"] = well_formed(str(identity))
    return document


def to_line(document: dict[str, str], prefix: bytes) -> bytes:
    """Return `prefix` and the line of a chunk, as `json.dumps` writes it.

    orjson writes the same strings 3 times as fast.
    """
    if orjson is None:
        return prefix + (json.dumps(document, ensure_ascii=False) + "\n").encode("utf-8")
    parts = [prefix, b'{"text": ', orjson.dumps(document["text"])]
    if "id" in document:
        parts += [b', "id": ', orjson.dumps(document["id"])]
    return b"".join([*parts, b"}\n"])


@contextmanager
def _naming_broken(file: Path) -> Iterator[None]:
    """Turn a decoder's error into a UserError that names the file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pyarrow, gzip and zlib raise different types
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the file
        raise UserError(
            f"{file} is broken ({first_line(error)}): replace or remove it, and run the same "
            "command again"
        ) from None
