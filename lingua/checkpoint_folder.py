"""One checkpoint folder on disk: written aside, published by a rename, checked, deleted.

Nothing here is a collective. `checkpoint.py` has the picture of a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lingua.args import fsync_path, write_atomic
from lingua.tensor_store import CONFIG_NAME, CONSOLIDATE_FOLDER, CONSOLIDATE_NAME, METADATA_NAME

FOLDER_NAME = "{:010d}"
TRAIN_STATE_NAME = "train_state_{:05d}.json"
MANIFEST_NAME = "manifest.json"
FOLDER_PATTERN = re.compile(r"[0-9]{10}")
UNFINISHED, REPLACED = ".tmp", ".replaced"  # suffixes of folders that are not checkpoints


def is_checkpoint(folder: Path) -> bool:
    return bool(FOLDER_PATTERN.fullmatch(folder.name)) and folder.is_dir()


def make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write_train_state(folder: Path, name: str | None, text: str) -> dict[str, Any]:
    """Write this rank's file; returns what the manifest says about all files of this rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    files = {p.name: _entry(p, digest=False) for p in folder.glob(f"__{rank}_*.distcp")}
    if name is not None:
        write_atomic(folder / name, text)
        files[name] = _entry(folder / name, digest=True)
    return files


def _entry(file: Path, *, digest: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"bytes": file.stat().st_size}
    if digest:
        entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return entry


def publish(
    unfinished: Path, final: Path, step: int, files: dict[str, Any], config: dict[str, Any]
) -> None:
    """Complete a folder that all ranks have written to, and give it its name."""
    write_atomic(unfinished / CONFIG_NAME, json.dumps(config, indent=2))
    for name in (METADATA_NAME, CONFIG_NAME):
        files[name] = _entry(unfinished / name, digest=True)
    write_atomic(unfinished / MANIFEST_NAME, json.dumps({"step": step, "files": files}, indent=2))
    problem = find_problem(unfinished)  # before anything older makes room for it
    if problem is not None:
        raise RuntimeError(f"{unfinished} was not written as it should be: {problem}")
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        os.rename(final, replaced)
    os.rename(unfinished, final)
    fsync_path(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def clear_leftovers(parent: Path) -> None:
    """Finish or undo what saves and deletions that were killed have left beside checkpoints."""
    for folder in list(parent.iterdir()) if parent.is_dir() else []:
        if not FOLDER_PATTERN.fullmatch(folder.stem) or not folder.is_dir():
            continue
        if folder.suffix == REPLACED and not folder.with_suffix("").exists():
            os.rename(folder, folder.with_suffix(""))
        elif folder.suffix in (UNFINISHED, REPLACED):
            shutil.rmtree(folder)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is no manifest, or one that this class did not write."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
    except (OSError, ValueError):
        return None
    return manifest if manifest.keys() == {"step", "files"} else None


def find_problem(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint. Tensor files are only held to their size."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return f"no readable {MANIFEST_NAME}"
    for name, want in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _entry(file, digest="sha256" in want) != want:
            return f"{name} is not what was written"
    return None


def is_own(folder: Path) -> bool:
    """Whether everything in the folder was written by this module."""
    manifest = _read_manifest(folder)
    if manifest is None or FOLDER_NAME.format(manifest["step"]) != folder.name:
        return False
    own = {*manifest["files"], MANIFEST_NAME, CONSOLIDATE_FOLDER}
    if not {p.name for p in folder.iterdir()} <= own:
        return False
    consolidated = folder / CONSOLIDATE_FOLDER
    inside = {p.name for p in consolidated.iterdir()} if consolidated.is_dir() else set()
    return {n for n in inside if ".tmp-" not in n} <= {CONSOLIDATE_NAME, CONFIG_NAME}


def remove_checkpoint(folder: Path) -> None:
    """Take the name away first: a deletion that is cut off leaves no half checkpoint."""
    doomed = folder.with_name(folder.name + UNFINISHED)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
