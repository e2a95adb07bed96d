"""Checkpoints from strangers: nothing that they say is run, and torch's own folders load."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lingua.checkpoint import CheckpointArgs, CheckpointManager, consolidate_checkpoints
from lingua.checkpointing import folder as on_disk
from lingua.checkpointing.dcp import load_from_checkpoint, read_tensors
from lingua.checkpointing.metadata import RECORDS, MetadataReader, read_metadata
from lingua.checkpointing.weights import load_initial_weights, read_weights
from lingua.errors import UserError
from tests.lingua.checkpointing.checkpoint_runs import assert_same_bits, build, manager_at

ROOT = Path(__file__).parents[3]
PWNED = "PWNED"  # the folder that every pickle below tries to make
MKDIR = f"__import__('os').mkdir({PWNED!r})"


class Call:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


class WithPersistentId(pickle.Pickler):
    def persistent_id(self, obj):
        return MKDIR


def by_name(module: str, name: str, *args) -> bytes:
    """Pickle a call of `module.name`, which may have dots, as protocol 4 allows."""
    texts = [pickle.SHORT_BINUNICODE + bytes([len(t)]) + t.encode() for t in (module, name)]
    call = pickle.dumps(args, 4)[2:-1] + pickle.REDUCE + b"."  # without PROTO and STOP
    return pickle.PROTO + b"\4" + b"".join(texts) + pickle.STACK_GLOBAL + call


def sets_on_class() -> bytes:
    """Set an attribute of torch's class Metadata, which later objects would have."""
    name = Metadata.__module__.encode()
    return b"c" + name + b"\nMetadata\n(N}X\5\0\0\0pwnedK\1stb."


def inside_metadata(value) -> bytes:
    return pickle.dumps(Metadata({}, planner_data={"model": value}, storage_data={}))


def with_persistent_id() -> bytes:
    file = Path("with_persistent_id")
    with open(file, "wb") as stream:
        WithPersistentId(stream).dump([1])
    return file.read_bytes()


MALICIOUS = {
    "system": lambda: pickle.dumps(Call(os.mkdir, PWNED)),
    "eval": lambda: pickle.dumps(Call(eval, MKDIR)),
    "exec by protocol 0": lambda: pickle.dumps(Call(exec, MKDIR), 0),
    "partial": lambda: pickle.dumps(Call(functools.partial(os.mkdir, PWNED))),
    "instance": lambda: f"(S'{PWNED}'\niposix\nmkdir\n.".encode(),
    "dotted": lambda: by_name("torch.serialization", "os.mkdir", PWNED),
    "dotted below an allowed class": lambda: by_name(
        Metadata.__module__, "Metadata.__init__.__globals__", PWNED
    ),
    "torch.hub": lambda: by_name("torch", "hub.os.mkdir", PWNED),
    "torch.load": lambda: by_name("torch", "load", "pickle"),
    "getattr": lambda: by_name("builtins", "getattr", 1, "real"),
    "persistent id": with_persistent_id,
    "inside metadata": lambda: inside_metadata(Call(os.mkdir, PWNED)),
    "enum": lambda: by_name("torch.distributed.checkpoint.metadata", "os.mkdir", PWNED),
    "attribute of a class": sets_on_class,
    "a call of metadata": lambda: by_name(Metadata.__module__, "Metadata", {}),
    "terminal codes": lambda: by_name("os", "\x1b[2Jsystem", "true"),
    "terminal codes in a number": lambda: b"F\x1b[2J\n.",
    "a tensor without chunks": lambda: pickle.dumps(
        Metadata({"a": TensorStorageMetadata(TensorProperties(), torch.Size([1]), [])}, None, {})
    ),
    "text": lambda: b"no pickle",
    "empty": lambda: b"",
    "a list": lambda: pickle.dumps([1, 2]),
    "no places": lambda: pickle.dumps(Metadata({"model.a": 1})),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not Path(PWNED).exists(), "the pickle was run"


@pytest.mark.parametrize("content", MALICIOUS.values(), ids=list(MALICIOUS))
def test_nothing_in_a_pickle_is_run(content, here):
    (here / ".metadata").write_bytes(content())
    with pytest.raises(UserError) as error:
        read_metadata(here)
    message = str(error.value)
    assert message.isprintable() and str(here / ".metadata") in message
    assert not hasattr(Metadata, "pwned") and not hasattr(RECORDS["Metadata"], "pwned")


# ---- every reader


@pytest.fixture
def saved(here):
    """A run's checkpoint."""
    manager = manager_at(here / "checkpoints")
    model, optimizer, state = build()
    state.step = 1
    manager.save(model, optimizer, state, {"a": 1})
    return manager.existing_saves[-1]


def forge(folder: Path, **contents: bytes) -> None:
    """Replace files, and their entries in the manifest."""
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = json.loads((folder / on_disk.MANIFEST_NAME).read_text())["files"]
    manifest = {"step": 1, "files": {name: on_disk._entry(folder / name) for name in files}}
    (folder / on_disk.MANIFEST_NAME).write_text(json.dumps(manifest))


def forged_tensors(folder: Path, entry: BytesStorageMetadata | None = None) -> dict[str, bytes]:
    """Return files in which every tensor, or entry of another kind, is a malicious pickle."""
    buffer = io.BytesIO()
    torch.save(Call(os.mkdir, PWNED), buffer)
    index = FileSystemReader(folder).read_metadata()
    index.storage_data = dict.fromkeys(
        index.storage_data, _StorageInfo("__0_0.distcp", 0, buffer.tell())
    )
    if entry is not None:
        index.state_dict_metadata = dict.fromkeys(index.state_dict_metadata, entry)
        index.storage_data = {MetadataIndex(i.fqn): p for i, p in index.storage_data.items()}
    return {".metadata": pickle.dumps(index), "__0_0.distcp": buffer.getvalue()}


def resume(folder: Path):
    CheckpointManager(CheckpointArgs(path=str(folder.parent))).load(*build())


def resume_from(folder: Path):
    manager_at(Path("new")).load(*build(), path=folder)


READERS = {
    "weights": lambda folder: read_weights(folder, "ckpt"),
    "init": lambda folder: load_initial_weights(str(folder), build()[0]),
    "load": lambda folder: load_from_checkpoint(folder, build()[0]),
    "consolidate": consolidate_checkpoints,
    "resume": resume,
    "resume from a path": resume_from,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
@pytest.mark.parametrize("file", [".metadata", ".distcp"])
def test_no_reader_runs_a_checkpoint(reader, file, saved):
    index = {".metadata": pickle.dumps(Call(os.mkdir, PWNED))}
    forge(saved, **(index if file == ".metadata" else forged_tensors(saved)))
    with pytest.raises(UserError, match=f"{file}.*nothing in it was run") as error:
        reader(saved)
    assert str(saved) in str(error.value)


def test_dcp_reads_the_index_with_our_reader(saved):
    forge(saved, **{".metadata": pickle.dumps(Call(os.mkdir, PWNED))})
    with pytest.raises(RuntimeError, match="nothing in it was run"):
        read_tensors(saved, {"model": {"a": torch.zeros(1)}}, is_collective=False)


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
def test_ctrl_c_while_tensors_are_read_is_not_a_damaged_file(reader, saved, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(MetadataReader, "read_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader(saved)


def test_an_entry_that_is_not_a_tensor_is_not_read(saved):
    forge(saved, **forged_tensors(saved, BytesStorageMetadata()))
    weights = {"output.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"model\.output\.weight"):
        read_tensors(saved, {"model": weights}, is_collective=False)
    for reader in (READERS["init"], READERS["load"], resume):
        with pytest.raises(UserError, match="does not fit the model"):
            reader(saved)


@pytest.mark.parametrize("new_format", [True, False])
def test_no_weight_file_is_run(new_format, here):
    content = {"model": {"a": torch.zeros(1), "b": Call(os.mkdir, PWNED)}}
    torch.save(content, "consolidated.pth", _use_new_zipfile_serialization=new_format)
    for read in (
        lambda: read_weights(here / "consolidated.pth", "ckpt"),
        lambda: load_initial_weights(str(here), build()[0]),
    ):
        with pytest.raises(UserError, match=r"consolidated\.pth"):
            read()


@pytest.mark.parametrize("place", ["../other/__0_0.distcp", "/etc/passwd"])
def test_no_file_outside_of_the_folder_is_read(place, saved):
    index = FileSystemReader(saved).read_metadata()
    for entry in index.storage_data.values():
        entry.relative_path = place
    forge(saved, **{".metadata": pickle.dumps(index)})
    with pytest.raises(UserError, match="outside of the folder"):
        read_weights(saved, "ckpt")


UNSAFE = re.compile(
    r"torch\.load\((?![^()]*weights_only=True)|allow_pickle=True|(unsafe_load|FullLoader)\b"
    r"|\b(FileSystemReader|_EmptyStateDictLoadPlanner|dcp_to_torch_save|pickle\.loads?)\("
)


def test_only_safe_readers_are_called():
    files = [f for folder in ("lingua", "apps", "setup") for f in (ROOT / folder).rglob("*.py")]
    assert not [file for file in files if UNSAFE.search(file.read_text(encoding="utf-8"))]


# ---- torch's own folders


def save_stock(state):
    with warnings.catch_warnings(action="ignore"):  # of a process without a group
        dcp.save(state, checkpoint_id="stock", no_dist=True)


def test_the_index_has_what_torch_reads(saved):
    """Compare with torch's own reader, for values of every kind."""
    values = {
        "model": {"a": torch.zeros(2, 3), "b": torch.tensor(1.0), "c": torch.zeros(0, 4).bool()},
        "half": torch.zeros(3, dtype=torch.bfloat16),
        "f8": torch.zeros(3).to(torch.float8_e4m3fn),
        "channels": torch.zeros(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "optim": {"param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "foreach": None}]},
        "text": "x",
    }
    save_stock(values)
    for folder in (Path("stock"), saved):
        ours, theirs = read_metadata(folder), FileSystemReader(folder).read_metadata()
        assert ours.state_dict_metadata == theirs.state_dict_metadata
        assert ours.storage_data == theirs.storage_data
        hints = [[index.index for index in m.storage_data] for m in (ours, theirs)]
        assert hints[0] == hints[1]


def test_stock_folders_load(here):
    """The weights of `dcp.save`, and those of two ranks that each hold a half of the rows."""
    model, *_ = build()
    save_stock({"model": model.state_dict()})
    assert_same_bits(read_weights(here / "stock", "ckpt"), dict(model.state_dict()))

    halves = torch.arange(12.0).reshape(4, 3).split(2)
    index = Metadata({}, storage_data={})
    chunks = []
    for rank, half in enumerate(halves):
        torch.save(half.clone(), f"__{rank}_0.distcp")
        offset = torch.Size((2 * rank, 0))
        chunks.append(ChunkStorageMetadata(offset, half.shape))
        length = Path(f"__{rank}_0.distcp").stat().st_size
        place = _StorageInfo(f"__{rank}_0.distcp", 0, length)
        index.storage_data[MetadataIndex("model.a", offset, rank)] = place
    entry = TensorStorageMetadata(TensorProperties(), torch.Size((4, 3)), chunks)
    index.state_dict_metadata = {"model.a": entry}
    Path(".metadata").write_bytes(pickle.dumps(index))
    assert torch.equal(read_weights(here, "ckpt")["a"], torch.cat(halves))
