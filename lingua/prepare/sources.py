"""Find files of documents by their names, in a folder and the folders below it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from lingua.errors import UserError
from lingua.files.listing import link_target
from lingua.prepare.readers import COMPRESSED, PLAIN_TEXT

LINES = (".jsonl", ".json", *PLAIN_TEXT)
SUFFIXES = (".parquet", ".arrow", *LINES, *(f"{s}{c}" for s in LINES for c in COMPRESSED))
NAMED = ".txt, .md, .jsonl, .json (also with .gz or .zst), .parquet or .arrow"
CARD = "README.md"  # describes a folder from the Hugging Face Hub, or a project
# Files beside documents that hold none: of `datasets`, of tokenizers and of this project.
NO_DOCUMENTS = {CARD, "state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
NO_DOCUMENTS |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
NO_DOCUMENTS |= {"manifest.json", "download.json"}
CACHES = "cache-*.arrow"  # in which `datasets` keeps results of map and filter
MAX_NAMED = 3  # of the files that are not read
# Bytes of text per byte of file. A wrong estimate costs only time.
EXPANSION = {".parquet": 2.0, ".gz": 3.0, ".zst": 3.0}


def find_document_files(source: Path, out: Path | None = None) -> list[Path]:
    """Return the file `source`, or all files below that folder with documents, sorted.

    The output folder `out` and its unfinished form are skipped if they are below `source`.
    """
    if source.is_file():
        if not source.name.endswith(SUFFIXES):
            raise UserError(f"{source}: unknown format; use a file that ends in {NAMED}")
        return [source]
    if not os.path.isdir(source):
        raise UserError(
            f"{source}{link_target(source)}: no such file or folder (seen from {Path.cwd()})"
        )
    found = sorted(path for path in _walk(source, out) if _is_read(path, source))
    if not found:
        raise UserError(f"{source} has no file that ends in {NAMED}")
    plain = [path.with_suffix("") if path.suffix in COMPRESSED else path for path in found]
    for path, n in Counter(plain).items():
        if n > 1:
            raise UserError(f"{path} is there {n} times, also compressed: keep one of the files")
    return found


def unfinished(out: Path) -> Path:
    """Return the folder in which `out` is made."""
    return out.with_name(f"{out.name}.unfinished")


def describe_skipped(folder: Path, out: Path | None = None) -> str | None:
    """List in one line the files below `folder` that `find_document_files` skips.

    Hidden files are listed only if their names end in one of SUFFIXES.
    """
    skipped = sorted(
        path
        for path in (_walk(folder, out) if folder.is_dir() else [])
        if not _is_read(path, folder)
        and (not _is_hidden(path, folder) or path.name.endswith(SUFFIXES))
    )
    if not skipped:
        return None
    names = [path.relative_to(folder).as_posix() for path in skipped[:MAX_NAMED]]
    more = ", ..." if len(skipped) > MAX_NAMED else ""
    return (
        f"{folder}: {len(skipped):,} files skipped ({', '.join(names)}{more}); files that end in "
        f"{NAMED} are read, but no {CARD}, metadata or hidden files, and no linked folders"
    )


def _walk(folder: Path, out: Path | None) -> Iterator[Path]:
    """Yield everything below `folder` except folders. Links to folders are not followed."""
    pruned = {os.path.abspath(path) for path in ([out, unfinished(out)] if out else [])}

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [f for f in folders if os.path.abspath(Path(parent, f)) not in pruned]
        yield from (Path(parent, name) for name in files)
        yield from (path for name in folders if (path := Path(parent, name)).is_symlink())


def _is_read(path: Path, folder: Path) -> bool:
    has_documents = path.name not in NO_DOCUMENTS and not fnmatchcase(path.name, CACHES)
    return (
        has_documents
        and path.name.endswith(SUFFIXES)
        and not path.name.endswith(".tokens.json")
        and not os.path.isdir(path)
        and not _is_hidden(path, folder)
    )


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def estimate_text_bytes(file: Path) -> int:
    return int(file.stat().st_size * EXPANSION.get(file.suffix, 1.0))
