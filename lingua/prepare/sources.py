"""Read published files of documents: parquet and JSON lines, compressed or not.

    for document in read_documents(Path("000_00000.parquet")): ...     {"text": ..., "id": ...}

Only the text (field `text` or, if missing or null, `content`) and the `id`, if any, are kept:
training reads nothing else.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lingua.dataloader.jsonl import find_text, is_blank, name_keys, parse_object
from lingua.errors import UserError, first_line, import_optional
from lingua.files.listing import check_file, link_target
from lingua.tokenizer import well_formed

TEXT_KEYS = ("text", "content")
TEXT_TYPES = ("string", "large_string", "string_view")  # of parquet columns
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
MAX_NAMED = 3  # of the files that are not read
BATCH_ROWS = 1024  # of a parquet file
# Bytes of text per byte of file. A wrong estimate costs only time.
EXPANSION = {".parquet": 2.0, ".gz": 3.0, ".zst": 3.0}


def find_document_files(folder: Path) -> list[Path]:
    """Return all files below `folder` that `read_documents` can read by their names, sorted."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}{link_target(folder)}: no such folder (seen from {Path.cwd()})")
    found = sorted(path for path in _walk(folder) if _is_read(path, folder))
    if not found:
        raise UserError(f"{folder} has no file that ends in {', '.join(SUFFIXES)}")
    return found


def describe_skipped(folder: Path) -> str | None:
    """List in one line the files below `folder` that `find_document_files` skips.

    Hidden files are listed only if their names end in one of SUFFIXES.
    """
    skipped = sorted(
        path
        for path in _walk(folder)
        if not _is_read(path, folder)
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


def _walk(folder: Path) -> Iterator[Path]:
    """Yield everything below `folder` except folders. Links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        yield from (Path(parent, name) for name in files)
        yield from (path for name in folders if (path := Path(parent, name)).is_symlink())


def _is_read(path: Path, folder: Path) -> bool:
    is_folder = os.path.isdir(path)
    return path.name.endswith(SUFFIXES) and not is_folder and not _is_hidden(path, folder)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def estimate_text_bytes(file: Path) -> int:
    return int(file.stat().st_size * EXPANSION.get(file.suffix, 1.0))


def check_document_file(file: Path) -> None:
    """Refuse a file that cannot be opened, and a truncated parquet file or one without text."""
    check_file(file)
    if file.suffix == ".parquet":
        with _naming_broken(file), _open_parquet(file) as table:
            _text_columns(file, table.schema_arrow)


def read_documents(file: Path) -> Iterator[dict[str, str]]:
    """Yield the documents in order. The text is "" if it is missing, null or blank.

    UserError that names the file if it cannot be read to its end.
    """
    return _read_parquet(file) if file.suffix == ".parquet" else _read_lines(file)


def _read_parquet(file: Path) -> Iterator[dict[str, str]]:
    with _naming_broken(file), _open_parquet(file) as table:
        texts = _text_columns(file, table.schema_arrow)
        columns = [*texts, "id"] if "id" in table.schema_arrow.names else texts
        for batch in table.iter_batches(BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                yield _document(find_text(row), row.get("id"))


def _open_parquet(file: Path) -> Any:
    parquet = import_optional("pyarrow.parquet", extra="data", needed_by=f"reading {file.name}")
    return parquet.ParquetFile(file)


def _text_columns(file: Path, schema: Any) -> list[str]:
    """Return the column of the text, then the one that replaces its nulls, if any."""
    kinds = {name: str(schema.field(name).type) for name in TEXT_KEYS if name in schema.names}
    if not kinds:
        raise UserError(f"{file} has no column text or content, but {', '.join(schema.names)}")
    first = next((name for name, kind in kinds.items() if kind != "null"), "text")
    if kinds[first] not in TEXT_TYPES:
        raise UserError(f"{file}: the column {first} has type {kinds[first]}, not text")
    return [name for name, kind in kinds.items() if kind in TEXT_TYPES]


def _read_lines(file: Path) -> Iterator[dict[str, str]]:
    with _naming_broken(file), _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if is_blank(line):
                continue
            try:
                row = parse_object(line)
                text = _text_of(row)
            except ValueError as error:
                raise UserError(f"{file}:{number}: {error}") from None
            yield _document(text, row.get("id"))


def _text_of(row: dict[str, Any]) -> str | None:
    text = find_text(row)
    if text is None and row.keys().isdisjoint(TEXT_KEYS):
        raise ValueError(f'no "text" or "content" (found: {name_keys(row)})')
    if text is None or isinstance(text, str):
        return text
    raise ValueError(f"the text is {json.dumps(text)[:40]}, not a string")


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
