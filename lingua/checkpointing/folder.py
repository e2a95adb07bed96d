"""One checkpoint folder on disk: write, publish by rename, check, delete.

Nothing here is a collective. See `lingua/checkpoint.py` for the files of a folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

from lingua.checkpointing.dcp import CONFIG_NAME, find_missing_tensors
from lingua.checkpointing.metadata import METADATA_NAME, map_in_threads
from lingua.errors import UserError
from lingua.files.atomic import fsync_path, write_atomic

logger = logging.getLogger(__name__)

FOLDER_NAME = "{:010d}"
TRAIN_STATE_NAME = "train_state_{:05d}.json"
MANIFEST_NAME = "manifest.json"
FOLDER_PATTERN = re.compile(r"[0-9]{10}")
UNFINISHED, REPLACED = ".tmp", ".replaced"  # suffixes of folders that are not checkpoints
# Names of the files that we write, temporary files of a killed run included.
OWN_NAME = re.compile(
    r"\.metadata(\.tmp)?|__\d+_\d+\.distcp|train_state_\d{5}\.json|(params|manifest)\.json"
    r"|consolidated(\.pth)?|\..+\.tmp-\d+"
)
CHUNK = 1 << 24  # bytes to read at a time


def is_checkpoint(folder: Path) -> bool:
    return bool(FOLDER_PATTERN.fullmatch(folder.name)) and folder.is_dir()


def is_published(folder: Path) -> bool:
    """Return whether a save completed here. Its files may be damaged since."""
    manifest = _read_manifest(folder)
    return manifest is not None and FOLDER_NAME.format(manifest["step"]) == folder.stem


def has_only_own_files(folder: Path) -> bool:
    return all(OWN_NAME.fullmatch(path.name) for path in folder.rglob("*"))


# ---- write and publish


def make_empty(folder: Path) -> None:
    if folder.exists():
        if not has_only_own_files(folder):
            raise UserError(f"{folder} blocks a checkpoint and contains other files: move it away")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


class TensorFiles(FileSystem):
    """The files of DCP's writer threads, with their manifest entries.

    The checksum is computed while the file is written. `errors` keeps the error of a thread,
    because torch's writer would lose it.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self.errors: list[Exception] = []
        self.is_cancelled = False

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        try:
            with _SummedFile(self, io.FileIO(path, mode)) as stream:
                yield stream
        except Exception as error:
            self.errors.append(error)
        else:
            entry = {"bytes": stream.n_bytes, "crc32": f"{stream.crc32:08x}"}
            self.entries[Path(path).name] = entry


class _SummedFile(io.BufferedWriter):
    n_bytes, crc32 = 0, 0

    def __init__(self, files: TensorFiles, raw: io.FileIO):
        super().__init__(raw)
        self.files = files

    def write(self, data: Any) -> int:
        for start in range(0, len(data), CHUNK):
            if self.files.is_cancelled:
                raise OSError("the save was cancelled")
            chunk = data[start : start + CHUNK]
            self.crc32 = zlib.crc32(chunk, self.crc32)
            super().write(chunk)
            if hasattr(os, "posix_fadvise"):  # Linux: start writing to the disk before fsync
                os.posix_fadvise(self.fileno(), self.n_bytes, len(chunk), os.POSIX_FADV_DONTNEED)
            self.n_bytes += len(chunk)
        return len(data)


def write_train_state(folder: Path, name: str, text: str) -> dict[str, Any]:
    """Write a rank's train state; return its manifest entry."""
    write_atomic(folder / name, text)
    return {name: _entry(folder / name)}


def publish(
    unfinished: Path, final: Path, step: int, files: dict[str, Any], config: dict[str, Any]
) -> None:
    """Complete a folder that all ranks have written, check it, and rename it to `final`."""
    write_atomic(unfinished / CONFIG_NAME, json.dumps(config, indent=2))
    for name in (METADATA_NAME, CONFIG_NAME):
        files[name] = _entry(unfinished / name)
    write_atomic(unfinished / MANIFEST_NAME, json.dumps({"step": step, "files": files}, indent=2))
    problem = find_problem(unfinished) or find_missing_tensors(unfinished)
    if problem is not None:
        raise OSError(f"{unfinished}: {problem}")
    if final.exists():
        os.rename(final, _unused_name(final.with_name(final.name + REPLACED)))
    os.rename(unfinished, final)
    fsync_path(final.parent)
    clear_leftovers(final.parent)


def _unused_name(path: Path) -> Path:
    """Append a number if `path` exists because it contains other files."""
    return next(p for i in range(10**9) if not (p := Path(f"{path}{i or ''}")).exists())


# ---- check


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the step and the files' entries; None if damaged or of another program."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        entries, step = manifest["files"].items(), manifest["step"]
        is_ours = all(entry.keys() == {"bytes", _digest_name(name)} for name, entry in entries)
        return manifest if is_ours and isinstance(step, int) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _entry(file: Path) -> dict[str, Any]:
    digest = _digest_name(file.name)
    value = _crc32(file) if digest == "crc32" else hashlib.sha256(file.read_bytes()).hexdigest()
    return {"bytes": file.stat().st_size, digest: value}


def _digest_name(file_name: str) -> str:
    """Choose a fast checksum for tensor files, which are large."""
    return "crc32" if file_name.endswith(".distcp") else "sha256"


def _crc32(file: Path) -> str:
    value = 0
    with open(file, "rb") as stream:
        while data := stream.read(CHUNK):
            value = zlib.crc32(data, value)
    return f"{value:08x}"


def find_problem(folder: Path) -> str | None:
    """Describe the first file that differs from the manifest. Of tensor files, check the size."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return f"no readable {MANIFEST_NAME}"
    for name, want in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != want["bytes"] or ("sha256" in want and _entry(file) != want):
            return f"{name} differs from what was written"
    return None


def check_files(folder: Path, source: str) -> None:
    """Raise UserError if a file is damaged. A folder that torch wrote has no manifest to check."""
    problem = find_problem(folder) if (folder / MANIFEST_NAME).exists() else None
    if problem is not None:
        raise UserError(f"{source}: the checkpoint is damaged: {problem}; name another one")


def check_tensor_files(folder: Path, rank: int, world_size: int) -> None:
    """Compare the checksums of this rank's share of the tensor files; OSError if one differs."""
    manifest = _read_manifest(folder) or {"files": {}}  # torch wrote the folder
    wants = sorted((n, e["crc32"]) for n, e in manifest["files"].items() if "crc32" in e)
    own = dict(wants[rank::world_size])
    found = map_in_threads(_crc32, [folder / name for name in own])
    for (name, want), crc32 in zip(own.items(), found, strict=True):
        if crc32 != want:
            raise OSError(f"{folder / name} differs from what was written")


# ---- delete


def is_own(folder: Path) -> bool:
    return is_published(folder) and has_only_own_files(folder)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so an interrupted deletion leaves no half one."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    if unfinished.exists():
        logger.warning(f"{folder} is not deleted because {unfinished} exists")
        return
    os.rename(folder, unfinished)
    shutil.rmtree(unfinished)


def clear_leftovers(parent: Path) -> None:
    """Finish or undo saves and deletions that were killed."""
    for folder in list(parent.iterdir()) if parent.is_dir() else []:
        if not FOLDER_PATTERN.fullmatch(folder.stem) or not folder.is_dir():
            continue
        final, was_replaced = folder.with_suffix(""), folder.suffix.startswith(REPLACED)
        if was_replaced and is_published(folder) and not final.exists():
            os.rename(folder, final)
        elif was_replaced or folder.suffix == UNFINISHED:
            if has_only_own_files(folder):
                shutil.rmtree(folder)
            else:
                logger.warning(f"{folder} is kept because it contains other files")
