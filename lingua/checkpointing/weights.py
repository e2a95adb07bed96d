"""Weights without optimizer state: read from a step folder or one file, written to one file.

A `.pth` file holds {"model": {name: tensor}}, as torch.save writes it. Other keys beside "model"
are ignored, so a file that `dcp_to_torch_save` made from a step folder works. A `.safetensors` file
holds tensors by name. The `params.json` in the same folder describes the model.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingua.checkpointing.dcp import (
    CONFIG_NAME,
    MODEL_KEY,
    TIED_COPY,
    Resize,
    check_fits,
    load_from_checkpoint,
    missing_as_zero,
    model_tensors,
    not_only_tensors,
    read_tensors,
    require_files,
)
from lingua.checkpointing.folder import check_files
from lingua.checkpointing.metadata import METADATA_NAME, read_metadata
from lingua.errors import UserError, first_line, import_optional
from lingua.files.atomic import open_atomic, write_atomic
from lingua.optim import is_matrix
from lingua.parallel.tensor_parallel import copy_whole

logger = logging.getLogger(__name__)

CONSOLIDATE_FOLDER = "consolidated"
CONSOLIDATE_NAME = "consolidated.pth"
SAFETENSORS_NAME = "model.safetensors"
WEIGHT_FILES = (CONSOLIDATE_NAME, SAFETENSORS_NAME, f"{CONSOLIDATE_FOLDER}/{CONSOLIDATE_NAME}")


def find_weights(path: Path) -> Path | None:
    """Return the step folder or weight file that `path` is, or the weight file inside it."""
    if path.is_file() or (path / METADATA_NAME).is_file():
        return path
    return next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)


def read_weights(
    source: Path,
    option: str,
    *,
    device: torch.device | str = "cpu",
    matrix_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Read whole tensors by name, from a step folder or a weight file. Not a collective.

    `matrix_dtype` is the dtype of weight matrices; all other tensors become fp32. None keeps the
    stored dtypes. On the CPU, tensors of a file are memory-mapped unless their dtype changes.
    UserError, naming `option`, if `source` is damaged or does not hold weights.
    """
    try:
        if source.is_dir():
            check_files(source, f"{option}={source}")
            return _read_step_folder(source, device, matrix_dtype)
        weights = _read_file(source, option)
    except (UserError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError:
        raise not_only_tensors(f"{option}={source}") from None
    except Exception as error:  # a damaged file can raise any error
        reason = f"weights are not readable: {first_line(error)}"
        raise UserError(f"{option}={source}: {reason}") from None
    return {
        name: tensor.to(device=device, dtype=weight_dtype(name, tensor, matrix_dtype))
        for name, tensor in weights.items()
    }


def weight_dtype(name: str, tensor: Tensor, matrix_dtype: torch.dtype | None) -> torch.dtype:
    if matrix_dtype is None:
        return tensor.dtype
    return matrix_dtype if is_matrix(name, tensor) else torch.float32


def _read_step_folder(
    folder: Path, device: torch.device | str, matrix_dtype: torch.dtype | None
) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, entry in model_tensors(read_metadata(folder)).items():
        like = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        dtype = weight_dtype(name, like, matrix_dtype)
        weights[name] = torch.empty(entry.size, dtype=dtype, device=device)
    read_tensors(folder, {MODEL_KEY: weights}, is_collective=False)
    return weights


def _read_file(file: Path, option: str) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        package = _import_safetensors(f"{option}={file}")
        try:
            return package.torch.load_file(file)
        except package.SafetensorError as error:
            raise RuntimeError(str(error)) from None
    content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    weights = content.get(MODEL_KEY, content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{option}={file} must hold {{'{MODEL_KEY}': {{name: tensor}}}}")
    return {name: tensor for name, tensor in weights.items() if name != TIED_COPY}


def write_weights(file: Path, weights: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write CPU tensors in the format of the suffix; only safetensors stores `metadata`."""
    if file.suffix == ".safetensors":
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        package = _import_safetensors(file.name)
        with open_atomic(file) as stream:
            package.torch.save_file(contiguous, stream.name, metadata=metadata)
            # safetensors replaces the file by one that only its owner may read
            os.chmod(stream.name, os.fstat(stream.fileno()).st_mode & 0o777)
        return
    with open_atomic(file) as stream:
        torch.save({MODEL_KEY: dict(weights)}, stream)


def check_can_write(name: str, needed_by: str) -> None:
    """Raise UserError if the package that writes files of this name is not installed."""
    if name.endswith(".safetensors"):
        _import_safetensors(needed_by)


def _import_safetensors(needed_by: str) -> Any:
    import_optional("safetensors.torch", extra="safetensors", needed_by=needed_by)
    return import_optional("safetensors", extra="safetensors", needed_by=needed_by)


def consolidate_checkpoints(ckpt_dir: str | os.PathLike) -> Path:
    """Write a step folder's weights to `consolidated/consolidated.pth`; return that folder.

    If the file and its config exist, do nothing. Call it in one process, with `run_on_rank_0`.
    """
    source = Path(ckpt_dir)
    folder = source / CONSOLIDATE_FOLDER
    target = folder / CONSOLIDATE_NAME
    if not target.is_file() or not (folder / CONFIG_NAME).is_file():
        require_files(source, METADATA_NAME, CONFIG_NAME)
        weights = read_weights(source, "ckpt_dir")
        folder.mkdir(exist_ok=True)
        write_atomic(folder / CONFIG_NAME, (source / CONFIG_NAME).read_bytes())
        write_weights(target, weights, metadata={})
        logger.info(f"consolidated weights in {target}")
    return folder


# ---- into a model


def load_initial_weights(
    path: str,
    model: nn.Module,
    zero_if_missing: Sequence[str] = (),
    resized: Mapping[str, Resize] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Fill a model, sharded or not, from a step folder or a weight file. A collective.

    Weights that are missing there are set to zero if `zero_if_missing` lists them. `resized` maps
    names of replicated weights to functions that fit a stored tensor to another number of rows.
    Returns the stored shapes by name.
    """
    option = "checkpoint.init_ckpt_path"
    source = find_weights(Path(path))
    if source is None:
        raise UserError(f"{option}={path} is neither a step folder nor a weight file")
    if source.is_dir():
        try:
            return load_from_checkpoint(
                source, model, zero_if_missing=zero_if_missing, resized=resized
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"{option}={source} is not readable: {first_line(error)}") from None
    weights = read_weights(source, option)
    targets = model.state_dict()
    for name in missing_as_zero(f"{option}={source}", targets, weights, zero_if_missing):
        targets.pop(name).zero_()
    stored = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name, resize in (resized or {}).items():
        if name in targets and name in weights:
            weights[name] = resize(weights[name], len(targets[name]))
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    check_fits(f"{option}={source}", targets, shapes, may_leave_out=True)
    for name, target in targets.items():
        copy_whole(target, weights[name])
    return stored
