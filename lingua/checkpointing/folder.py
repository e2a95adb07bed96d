"""One checkpoint folder on disk: written aside, published by a rename, checked, deleted.

Nothing here is a collective. `checkpoint.py` has the picture of a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lingua.checkpointing.dcp import (
    CONFIG_NAME,
    METADATA_NAME,
    find_missing_tensors,
)
from lingua.errors import UserError
from lingua.files.atomic import fsync_path, write_atomic

logger = logging.getLogger(__name__)

FOLDER_NAME = "{:010d}"
TRAIN_STATE_NAME = "train_state_{:05d}.json"
MANIFEST_NAME = "manifest.json"
FOLDER_PATTERN = re.compile(r"[0-9]{10}")
UNFINISHED, REPLACED = ".tmp", ".replaced"  # suffixes of folders that are not checkpoints
# The files of a checkpoint, by name; those that were being written when a run was killed, too.
OWN_NAME = re.compile(
    r"\.metadata(\.tmp)?|__\d+_\d+\.distcp|train_state_\d{5}\.json|(params|manifest)\.json"
    r"|consolidated(\.pth)?|\..+\.tmp-\d+"
)
CHUNK = 1 << 24  # bytes that are read at a time


def is_checkpoint(folder: Path) -> bool:
    return bool(FOLDER_PATTERN.fullmatch(folder.name)) and folder.is_dir()


def is_published(folder: Path) -> bool:
    """Whether a save came to its end here; what it wrote may have been damaged since."""
    manifest = _read_manifest(folder)
    return manifest is not None and FOLDER_NAME.format(manifest["step"]) == folder.stem


def make_empty(folder: Path) -> None:
    if folder.exists():
        if not is_all_ours(folder):
            raise UserError(
                f"{folder} is in the way of a checkpoint and holds files of somebody else: move it"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def is_all_ours(folder: Path) -> bool:
    """Whether every file, in the folder and below, has a name that this module gives."""
    return all(OWN_NAME.fullmatch(path.name) for path in folder.rglob("*"))


def write_train_state(folder: Path, name: str | None, text: str) -> dict[str, Any]:
    """Write this rank's file; returns what the manifest says about all files of this rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    files = {p.name: _entry(p) for p in folder.glob(f"__{rank}_*.distcp")}
    if name is not None:
        write_atomic(folder / name, text)
        files[name] = _entry(folder / name)
    return files


def _entry(file: Path) -> dict[str, Any]:
    """Tensor files are large: their checksum is one that is quick to take."""
    digest = (
        {"crc32": _crc32(file)}
        if file.suffix == ".distcp"
        else {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    )
    return {"bytes": file.stat().st_size, **digest}


def _crc32(file: Path) -> str:
    value = 0
    with open(file, "rb") as stream:
        while data := stream.read(CHUNK):
            value = zlib.crc32(data, value)
    return f"{value:08x}"


def publish(
    unfinished: Path, final: Path, step: int, files: dict[str, Any], config: dict[str, Any]
) -> None:
    """Complete a folder that all ranks have written to, try it, and give it its name."""
    write_atomic(unfinished / CONFIG_NAME, json.dumps(config, indent=2))
    for name in (METADATA_NAME, CONFIG_NAME):
        files[name] = _entry(unfinished / name)
    write_atomic(unfinished / MANIFEST_NAME, json.dumps({"step": step, "files": files}, indent=2))
    problem = find_problem(unfinished) or find_missing_tensors(unfinished)
    if problem is not None:
        raise OSError(f"{unfinished} is not what was written to it: {problem}")
    replaced = _unused_name(final.with_name(final.name + REPLACED))
    if final.exists():
        os.rename(final, replaced)
    os.rename(unfinished, final)
    fsync_path(final.parent)
    clear_leftovers(final.parent)


def _unused_name(path: Path) -> Path:
    """Where somebody's files have kept a folder from being deleted, another name is free."""
    return next(p for i in range(10**9) if not (p := Path(f"{path}{i or ''}")).exists())


def clear_leftovers(parent: Path) -> None:
    """Finish or undo what saves and deletions that were killed have left beside checkpoints."""
    for folder in list(parent.iterdir()) if parent.is_dir() else []:
        if not FOLDER_PATTERN.fullmatch(folder.stem) or not folder.is_dir():
            continue
        if (
            folder.suffix.startswith(REPLACED)
            and is_published(folder)
            and not folder.with_suffix("").exists()
        ):
            os.rename(folder, folder.with_suffix(""))
        elif folder.suffix == UNFINISHED or folder.suffix.startswith(REPLACED):
            if is_all_ours(folder):
                shutil.rmtree(folder)
            else:
                logger.warning(f"{folder} is left: it holds files that are no checkpoint's")


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is no manifest, or none of the form that `publish` gives it: it may be
    damaged, or of somebody else."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.keys() != {"step", "files"}:
        return None
    files = manifest["files"]
    if not isinstance(manifest["step"], int) or not isinstance(files, dict):
        return None
    return manifest if all(map(_is_entry, files.values())) else None


def _is_entry(value: Any) -> bool:
    digests = ({"bytes", "crc32"}, {"bytes", "sha256"})
    return isinstance(value, dict) and value.keys() in digests


def find_problem(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint. Tensor files are only held to their size."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return f"no readable {MANIFEST_NAME}"
    for name, want in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        is_small = "sha256" in want
        if file.stat().st_size != want["bytes"] or (is_small and _entry(file) != want):
            return f"{name} is not what was written"
    return None


def check_tensor_files(folder: Path, rank: int, world_size: int) -> None:
    """Read this rank's share of the tensor files, and raise where one is not what was written."""
    manifest = _read_manifest(folder) or {"files": {}}  # without one: of torch's own making
    wants = sorted((n, w["crc32"]) for n, w in manifest["files"].items() if "crc32" in w)
    for name, want in wants[rank::world_size]:
        if _crc32(folder / name) != want:
            raise OSError(f"{folder / name} is not what was written: its checksum is another")


def is_own(folder: Path) -> bool:
    """Whether everything in the folder was written by this module."""
    return is_published(folder) and is_all_ours(folder)


def remove_checkpoint(folder: Path) -> None:
    """Take the name away first: a deletion that is cut off leaves no half checkpoint."""
    doomed = folder.with_name(folder.name + UNFINISHED)
    if doomed.exists():
        logger.warning(f"{folder} is not deleted: {doomed} is in the way")
        return
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
