"""Read `.metadata`, the index of a DCP folder, without running code from it.

The file is a pickle, so torch's reader runs whatever it says. Here every class of torch's metadata
is replaced by a record that only stores the pickle's values, and any other name is refused. torch's
objects are then built from the checked records.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what its read_data needs
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from lingua.errors import UserError, first_line

METADATA_NAME = ".metadata"


class Record:
    """An object of the pickle, which only stores its state."""

    state: Any = None

    def __new__(cls, *args: Any) -> Record:
        return super().__new__(cls)

    # Without this method, a pickle could set attributes of the class itself.
    def __setstate__(self, state: Any) -> None:
        self.state = state


RECORDS = {
    name: type(name, (Record,), {})
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
        "_StorageInfo",
    )
}
KNOWN: dict[str, Any] = {  # every name in a pickle of torch 2.5 to 2.13, apart from dtypes
    **{f"torch.distributed.checkpoint.metadata.{name}": RECORDS[name] for name in RECORDS},
    "torch.distributed.checkpoint.filesystem._StorageInfo": RECORDS["_StorageInfo"],
    "torch.Size": tuple,
    # Not used: the layout of a tensor, and the path of the folder.
    "torch.serialization._get_layout": Record,
    "pathlib.PosixPath": Record,
    "pathlib._local.PosixPath": Record,  # Python 3.13
    "pathlib.WindowsPath": Record,
    "pathlib._local.WindowsPath": Record,
}


def max_threads() -> int:
    """Return how many threads of this rank may read or write the files of a checkpoint.

    At least two, because one can wait for the disk.
    """
    n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(2, min(8, (os.cpu_count() or 1) // n_ranks))


class MetadataReader(FileSystemReader):
    """DCP's reader of a folder, with a safe `read_metadata` and several threads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        def read(item: ReadItem) -> None:
            super(MetadataReader, self).read_data(replace(plan, items=[item]), planner)

        map_in_threads(read, plan.items)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def map_in_threads(action: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return the results in order. The first error, or Ctrl-C, cancels items not yet started."""
    pool = ThreadPoolExecutor(max_threads())
    try:
        return list(pool.map(action, items))
    finally:
        pool.shutdown(cancel_futures=True)


def read_metadata(folder: Path) -> Metadata:
    """Read the index of a DCP folder. UserError if it is damaged or would run code."""
    file = folder / METADATA_NAME
    with open(file, "rb") as stream:
        try:
            return _metadata(_Unpickler(stream).load())
        except Exception as error:  # a damaged pickle can raise any error
            raise UserError(
                f"{file} is not the index of a checkpoint: {first_line(error)}; nothing in it was "
                "run. Do not use this checkpoint unless you know who wrote it"
            ) from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name in KNOWN:
            return KNOWN[name]
        dtype = vars(torch).get(global_name) if module_name == "torch" else None
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it refers to {name!a}, which no checkpoint needs")
        return dtype


# ---- from records to torch's objects


def _metadata(root: Any) -> Metadata:
    state = _state(root, "Metadata")
    tensors, places = state["state_dict_metadata"], state["storage_data"]
    return Metadata(
        state_dict_metadata={_is(str, key): _entry(entry) for key, entry in tensors.items()},
        storage_data={_index(index): _place(place) for index, place in places.items()},
    )


def _entry(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(entry, RECORDS["BytesStorageMetadata"]):
        return BytesStorageMetadata()
    state = _state(entry, "TensorStorageMetadata")
    dtype, *_ = _state(state["properties"], "TensorProperties", tuple)
    states = [_state(chunk, "ChunkStorageMetadata") for chunk in state["chunks"]]
    chunks = [
        ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"]))
        for chunk in states
    ]
    size = torch.Size(state["size"])
    if sum(chunk.sizes.numel() for chunk in chunks) < size.numel():
        raise ValueError(f"it lacks a part of a tensor of size {tuple(size)}")
    return TensorStorageMetadata(TensorProperties(dtype=_is(torch.dtype, dtype)), size, chunks)


def _index(index: Any) -> MetadataIndex:
    state = _state(index, "MetadataIndex")
    return MetadataIndex(_is(str, state["fqn"]), state.get("offset"), state.get("index"))


def _place(place: Any) -> _StorageInfo:
    state = _state(place, "_StorageInfo")
    file = _is(str, state["relative_path"])
    if Path(file).name != file:
        raise ValueError(f"it refers to {file!a}, a file outside of the folder")
    offset, length = _is(int, state["offset"]), _is(int, state["length"])
    transforms = [_is(str, name) for name in state.get("transform_descriptors") or ()]
    return _StorageInfo(file, offset, length, transforms or None)


def _state(record: Any, name: str, kind: type = dict) -> Any:
    """Return the state of a record of this name, a dict of its fields or another `kind`."""
    return _is(kind, _is(RECORDS[name], record).state)


def _is(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"it holds {type(value).__name__} in place of {kind.__name__}")
    return value
