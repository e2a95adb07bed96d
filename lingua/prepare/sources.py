"""Read published files of documents: parquet and JSON lines, compressed or not.

    for document in read_documents(Path("000_00000.parquet")): ...     {"text": ..., "id": ...}

Only the text (field `text` or, if missing, `content`) and the `id`, if any, are kept: training
reads nothing else.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lingua.dataloader.jsonl import name_keys, parse_object
from lingua.errors import UserError, first_line, import_optional
from lingua.tokenizer import well_formed

TEXT_KEYS = ("text", "content")
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
MAX_NAMED = 3  # of the files that are not read
BATCH_ROWS = 1024  # of a parquet file
# Bytes of text per byte of file. A wrong estimate costs only time.
EXPANSION = {".parquet": 2.0, ".gz": 3.0, ".zst": 3.0}


def find_document_files(folder: Path) -> list[Path]:
    """Return all files below `folder` that `read_documents` can read, sorted by path."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (seen from {Path.cwd()})")
    found = sorted(path for path in folder.rglob("*") if _is_read(path, folder))
    if not found:
        raise UserError(f"{folder} has no file that ends in {', '.join(SUFFIXES)}")
    return found


def describe_skipped(folder: Path) -> str | None:
    """List in one line the files below `folder` that `find_document_files` skips.

    Hidden files are listed only if their names end in one of SUFFIXES.
    """
    skipped = sorted(
        path
        for path in folder.rglob("*")
        if not _is_read(path, folder)
        and (path.is_symlink() or not path.is_dir())  # links to folders are not followed
        and (not _is_hidden(path, folder) or path.name.endswith(SUFFIXES))
    )
    if not skipped:
        return None
    names = [path.relative_to(folder).as_posix() for path in skipped[:MAX_NAMED]]
    more = ", ..." if len(skipped) > MAX_NAMED else ""
    return (
        f"{folder}: {len(skipped):,} files skipped ({', '.join(names)}{more}): only files that end "
        f"in {', '.join(SUFFIXES)} are read, no hidden files and no linked folders"
    )


def _is_read(path: Path, folder: Path) -> bool:
    return path.name.endswith(SUFFIXES) and path.is_file() and not _is_hidden(path, folder)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def estimate_text_bytes(file: Path) -> int:
    return int(file.stat().st_size * EXPANSION.get(file.suffix, 1.0))


def check_document_file(file: Path) -> None:
    """Refuse a parquet file that is truncated or has no text, without reading all of it."""
    if file.suffix == ".parquet":
        with _naming_broken(file), _open_parquet(file) as table:
            _text_column(file, table.schema_arrow)


def read_documents(file: Path) -> Iterator[dict[str, str]]:
    """Yield the documents in order. The text is "" if it is missing, null or blank.

    UserError that names the file if it cannot be read to its end.
    """
    return _read_parquet(file) if file.suffix == ".parquet" else _read_lines(file)


def _read_parquet(file: Path) -> Iterator[dict[str, str]]:
    with _naming_broken(file), _open_parquet(file) as table:
        text = _text_column(file, table.schema_arrow)
        columns = [text, "id"] if "id" in table.schema_arrow.names else [text]
        for batch in table.iter_batches(BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                yield _document(row[text], row.get("id"))


def _open_parquet(file: Path) -> Any:
    parquet = import_optional("pyarrow.parquet", extra="data", needed_by=f"reading {file.name}")
    return parquet.ParquetFile(file)


def _text_column(file: Path, schema: Any) -> str:
    text = next((name for name in TEXT_KEYS if name in schema.names), None)
    if text is None:
        raise UserError(f"{file} has no column text or content, but {', '.join(schema.names)}")
    kind = str(schema.field(text).type)
    if kind not in ("string", "large_string", "string_view"):
        raise UserError(f"{file}: the column {text} has type {kind}, not text")
    return text


def _read_lines(file: Path) -> Iterator[dict[str, str]]:
    with _naming_broken(file), _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_object(line)
                text = _text_of(row)
            except ValueError as error:
                raise UserError(f"{file}:{number}: {error}") from None
            yield _document(text, row.get("id"))


def _text_of(row: dict[str, Any]) -> str | None:
    for key in TEXT_KEYS:
        if key in row:
            if row[key] is None or isinstance(row[key], str):
                return row[key]
            raise ValueError(f'"{key}" is {json.dumps(row[key])[:40]}, not text')
    raise ValueError(f'no "text" or "content" (found: {name_keys(row)})')


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file)  # pyright: ignore[reportReturnType]
    if file.suffix == ".zst":
        pyarrow = import_optional("pyarrow", extra="data", needed_by=f"reading {file.name}")
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), 2**20)
    return open(file, "rb")


def _document(text: str | None, identity: Any) -> dict[str, str]:
    document = {"text": "" if not text or text.isspace() else well_formed(text)}
    if identity is not None:
        document["id"] = well_formed(str(identity))
    return document


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
            f"{file} is broken ({first_line(error)}): remove it and run the same command again to "
            "download it again, or replace it first"
        ) from None
