"""Weights in one file, without optimizer: `consolidated.pth` or `model.safetensors`.

A `.pth` holds {"model": {name: tensor}}, as torch.save writes it; more keys may stand beside
"model", as in what `dcp_to_torch_save` makes of a step folder. A `.safetensors` holds the tensors
by name. The `params.json` beside the file says what model they belong to.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingua.checkpointing.dcp import (
    CONSOLIDATE_FOLDER,
    CONSOLIDATE_NAME,
    METADATA_NAME,
    MODEL_KEY,
    check_fits,
    load_from_checkpoint,
)
from lingua.errors import UserError, import_optional
from lingua.parallel.tensor_parallel import copy_whole

SAFETENSORS_NAME = "model.safetensors"


def find_weight_file(path: Path) -> Path | None:
    """The file of weights that `path` is, or that lies in it under one of the usual names."""
    if path.is_file():
        return path
    for name in (CONSOLIDATE_NAME, SAFETENSORS_NAME, f"{CONSOLIDATE_FOLDER}/{CONSOLIDATE_NAME}"):
        if (path / name).is_file():
            return path / name
    return None


def read_weights(file: Path, option: str) -> dict[str, Tensor]:
    """CPU tensors by name, mapped: pages are read when a tensor is copied or used.

    A file that holds anything else is a UserError that names `option`.
    """
    if file.suffix == ".safetensors":
        return _read_safetensors(file, option)
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise _not_weights(file, option, error) from None
    weights = content.get(MODEL_KEY, content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{option}={file}: expected {{'{MODEL_KEY}': {{name: tensor}}}}")
    return weights


def _read_safetensors(file: Path, option: str) -> dict[str, Tensor]:
    package = _safetensors(f"{option}={file}")
    try:
        return package.torch.load_file(file)
    except (package.SafetensorError, OSError) as error:
        raise _not_weights(file, option, error) from None


def _not_weights(file: Path, option: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(f"{option}={file}: not a file of weights: {reason}")


def write_weights(file: Path, weights: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write CPU tensors in the form that the name says; `metadata` goes into a safetensors file."""
    if file.suffix == ".safetensors":
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        _safetensors(file.name).torch.save_file(contiguous, file, metadata=metadata)
    else:
        torch.save({MODEL_KEY: dict(weights)}, file)


def check_can_write(name: str, needed_by: str) -> None:
    """UserError where the package that writes files of this name is not installed."""
    if name.endswith(".safetensors"):
        _safetensors(needed_by)


def _safetensors(needed_by: str) -> Any:
    import_optional("safetensors.torch", extra="safetensors", needed_by=needed_by)
    return import_optional("safetensors", extra="safetensors", needed_by=needed_by)


# ---- into a model


def check_init_path(path: str | None) -> None:
    """Refuse a checkpoint.init_ckpt_path that `load_initial_weights` would find nothing in."""
    if path is None or Path(path, METADATA_NAME).is_file() or find_weight_file(Path(path)):
        return
    raise UserError(
        f"checkpoint.init_ckpt_path={path}: no checkpoint there (no {METADATA_NAME}); name a step "
        f"folder such as <dump_dir>/checkpoints/0000001000, or a {CONSOLIDATE_NAME} or "
        f"{SAFETENSORS_NAME}"
    )


def load_initial_weights(path: str, model: nn.Module) -> None:
    """Fill a model, sharded or not, from a step folder or a file of weights. A collective."""
    check_init_path(path)
    if Path(path, METADATA_NAME).is_file():
        load_from_checkpoint(path, model)
        return
    file = find_weight_file(Path(path))
    assert file is not None, "check_init_path has found it"
    weights = read_weights(file, "checkpoint.init_ckpt_path")
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_fits(file, state, shapes, may_leave_out=True)
    for name, tensor in state.items():
        copy_whole(tensor, weights[name])
