"""Files of documents as they are handed out: parquet, and JSON lines, compressed or not.

    for document in read_documents(Path("000_00000.parquet")): ...     {"text": ..., "id": ...}

Read is the text, from the field `text` or, where there is none, `content`, and the `id` if there is
one. All else is left behind: training reads the text alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lingua.args import UserError
from lingua.errors import import_optional
from lingua.jsonl import parse_line
from lingua.tokenizer import well_formed

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
BATCH_ROWS = 1024  # of a parquet file at a time
# Bytes of text for each byte of such a file, to plan with: what is planned wrongly costs time only.
EXPANSION = {".parquet": 2.0, ".gz": 3.0, ".zst": 3.0}


def find_document_files(folder: Path) -> list[Path]:
    """All files under `folder` that `read_documents` reads, in the order of their paths."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (seen from {Path.cwd()})")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(SUFFIXES)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise UserError(f"{folder} has no file that ends in {', '.join(SUFFIXES)}")
    return found


def estimate_text_bytes(file: Path) -> int:
    return int(file.stat().st_size * EXPANSION.get(file.suffix, 1.0))


def read_documents(file: Path) -> Iterator[dict[str, str]]:
    """Documents in their order; "" is the text of one that has none.

    A file that cannot be read to its end is a UserError that names it.
    """
    return _read_parquet(file) if file.suffix == ".parquet" else _read_lines(file)


def _read_parquet(file: Path) -> Iterator[dict[str, str]]:
    parquet = import_optional("pyarrow.parquet", extra="data", needed_by=f"reading {file.name}")
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            text = next((name for name in ("text", "content") if name in names), None)
            if text is None:
                raise UserError(f"{file} has no column text or content, but {', '.join(names)}")
            columns = [text, "id"] if "id" in names else [text]
            for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield _document(row[text], row.get("id"))
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        if isinstance(error, UserError):
            raise
        raise _unreadable(file, error) from None


def _read_lines(file: Path) -> Iterator[dict[str, str]]:
    end = 0
    try:
        with _open(file) as lines:
            for line in lines:
                end += len(line)
                if line.strip():
                    row = parse_line(line, str(file), end)
                    yield _document(row.get("text", row.get("content")), row.get("id"))
    except (OSError, EOFError) as error:
        raise _unreadable(file, error) from None


def _open(file: Path) -> BinaryIO:
    compression = COMPRESSIONS.get(file.suffix)
    if compression is None:
        return open(file, "rb")
    if compression == "gzip":
        import gzip

        return gzip.open(file)  # pyright: ignore[reportReturnType]
    import io

    pyarrow = import_optional("pyarrow", extra="data", needed_by=f"reading {file.name}")
    return io.BufferedReader(pyarrow.input_stream(str(file), compression=compression), 2**20)


def _document(text: str | None, identity: Any) -> dict[str, str]:
    document = {"text": well_formed(text or "")}
    if identity is not None:
        document["id"] = well_formed(str(identity))
    return document


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file} is broken ({error}): remove it and run the same command again, which downloads "
        "what is missing"
    )
