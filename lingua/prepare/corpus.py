"""Make a source of training data from a file or folder of documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lingua.errors import UserError, is_machine_fault
from lingua.prepare.shuffle import ShufflePlan, shuffle_documents
from lingua.prepare.sources import describe_skipped, find_document_files
from lingua.prepare.splits import select_split

GB = 10**9
MIN_MEMORY = 0.01  # GB


def prepare_corpus(
    source: Path,
    out: Path,
    plan: ShufflePlan,
    *,
    split: str | None = None,
    keep_unfinished: bool = True,
) -> dict[str, Any]:
    """Shuffle the documents of `source` into the folder `out`, and return its manifest.

    `split`: of a folder, see splits.py; None reads all files. `keep_unfinished`: see
    `shuffle_documents`. Prints progress, and which files are skipped.
    """
    files = find_document_files(source, out)
    root = source.parent if source.is_file() else source
    if split is not None and source.is_dir():
        files, other_splits = select_split(files, root, split)
        for line in filter(None, (describe_skipped(source, out), other_splits)):
            print(line)
    return shuffle_documents(files, root, out, plan, keep_unfinished=keep_unfinished)


def memory_bytes(gigabytes: float, option: str) -> int:
    if not MIN_MEMORY <= gigabytes < float("inf"):
        raise UserError(f"{option}={gigabytes} must be at least {MIN_MEMORY} (GB)")
    return int(gigabytes * GB)


@contextmanager
def file_errors(prefix: str = "") -> Iterator[None]:
    """Turn an OSError into a UserError, unless it is a fault of the machine."""
    try:
        yield
    except OSError as error:
        if is_machine_fault(error):
            raise
        raise UserError(f"{prefix}{error}; fix it and run the same command again") from None


def describe(manifest: Mapping[str, Any]) -> str:
    """Describe a corpus in one line."""
    n_validation, n_empty = manifest["request"]["validation_documents"], manifest["without_text"]
    n, n_chunks = manifest["documents"], manifest["request"]["nchunks"]
    size = format_bytes(sum(facts["bytes"] for facts in manifest["files"].values()))
    line = f"{n:,} document{'s' * (n > 1)}, {size}, in {n_chunks} chunk{'s' * (n_chunks > 1)}"
    if n_validation:
        line += f" and a validation file ({n_validation:,})"
    return f"{line}; skipped {n_empty:,} without text" if n_empty else line


def format_bytes(n: int) -> str:
    for unit, size in (("GB", GB), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"
