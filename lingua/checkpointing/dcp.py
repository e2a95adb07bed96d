"""Model and optimizer tensors in a folder, written by all ranks, readable by any number of them.

The format is torch's distributed checkpoint (DCP): keys are `model.<parameter>` and
`optim.state.<parameter>.<exp_avg | exp_avg_sq | step>`, or `momentum_buffer` for a matrix that Muon
moves. Learning rates and other hyperparameters are not in it: they come from the config of the run
that loads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from lingua.errors import UserError
from lingua.files.atomic import open_atomic, write_atomic
from lingua.logger import log_on_rank_0
from lingua.optim import state_fields

logger = logging.getLogger(__name__)

MODEL_KEY, OPTIM_KEY = "model", "optim"
METADATA_NAME = ".metadata"
CONFIG_NAME = "params.json"
CONSOLIDATE_FOLDER = "consolidated"
CONSOLIDATE_NAME = "consolidated.pth"

Metadata = dict[str, Any]  # DCP key -> what is stored there


def find_missing_tensors(folder: Path) -> str | None:
    """What the index names and the files are too short for."""
    metadata = FileSystemReader(folder).read_metadata()
    for key, place in (metadata.storage_data or {}).items():
        file = folder / place.relative_path
        if not file.is_file() or file.stat().st_size < place.offset + place.length:
            return f"{file.name} has no {key.fqn}"
    return None


def load_from_checkpoint(
    ckpt_dir: str | os.PathLike,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    model_key: str = MODEL_KEY,
    optim_key: str = OPTIM_KEY,
) -> None:
    """Fill model and optimizer in place. An empty `model_key` reads a folder that is all model.

    Weights that are in the folder and not in the model are left out, with a warning; with an
    optimizer, which says that a run goes on, that is a UserError. So is the opposite, or another
    shape. A collective: call it on all ranks.
    """
    folder = Path(ckpt_dir)
    if not (folder / METADATA_NAME).is_file():
        raise UserError(
            f"{folder} is no checkpoint folder: it has no {METADATA_NAME} file; give a folder "
            "such as <dump_dir>/checkpoints/0000001000"
        )
    metadata: Metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = model.state_dict()
    prefix = f"{model_key}." if model_key else ""
    stored = {
        key.removeprefix(prefix): tuple(value.size)
        for key, value in metadata.items()
        if key.startswith(prefix) and isinstance(value, TensorStorageMetadata)
    }
    if not prefix:  # whatever else lies at the root is no weight
        stored = {name: size for name, size in stored.items() if name in weights}
    check_fits(folder, weights, stored, may_leave_out=optimizer is None)
    state: dict[str, Any] = {model_key: weights} if model_key else dict(weights)
    filled: dict[str, dict[str, Tensor]] = {}
    if optimizer is not None:
        filled = _empty_optimizer_state(model, optimizer, metadata, f"{optim_key}.state.")
        check_same_optimizer(folder, model, optimizer, filled)
        state[optim_key] = {"state": filled}
    with _dcp():
        dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=not dist.is_initialized())
    if optimizer is not None:
        for name, param in _optimized(model, optimizer).items():
            optimizer.state[param] = filled.get(name, {})


def check_fits(
    source: Path,
    weights: Mapping[str, Any],
    stored: Mapping[str, tuple[int, ...]],
    *,
    may_leave_out: bool,
) -> None:
    """UserError where a model's `weights` are not all `stored`, or not in their shapes.

    What is stored and not in the model is one, too, unless it `may_leave_out` that with a warning.
    """
    wanted = {name: tuple(t.shape) for name, t in weights.items() if isinstance(t, Tensor)}
    wrong = [
        f"{name} is {stored.get(name, 'not there')}, the model has {shape}"
        for name, shape in wanted.items()
        if stored.get(name) != shape
    ]
    unused = sorted(stored.keys() - wanted.keys())
    if not may_leave_out:
        wrong += [f"{name} is {stored[name]}, the model has no such tensor" for name in unused]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(
            f"the checkpoint {source} does not fit the model: {'; '.join(wrong[:3])}{more}"
        )
    if unused:
        told = "not loaded from %s, the model has no such tensors: %s"
        log_on_rank_0(told, source, unused, level=logging.WARNING)


# ---- optimizer state by parameter name


def _optimized(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    names = {param: name for name, param in model.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(p in names for p in params), "the optimizer holds parameters of another model"
    return {names[param]: param for param in params}


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's own tensors by parameter name; a parameter that never moved has none."""
    return {
        name: dict(optimizer.state[param])
        for name, param in _optimized(model, optimizer).items()
        if optimizer.state.get(param)
    }


def check_same_optimizer(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    stored: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """UserError where what is stored for a parameter is another optimizer's."""
    wanted = state_fields(optimizer)
    for name, param in _optimized(model, optimizer).items():
        found = stored.get(name, {}).keys()
        if found and found != wanted[param]:
            raise UserError(
                f"optim.name: the checkpoint {folder} has {', '.join(sorted(found))} of {name}, "
                f"where this optimizer keeps {', '.join(sorted(wanted[param]))}; leave optim.name "
                "as it was, or start a new run from the weights by checkpoint.init_ckpt_path"
            )


def _empty_optimizer_state(
    model: nn.Module, optimizer: Optimizer, metadata: Metadata, prefix: str
) -> dict[str, dict[str, Tensor]]:
    """Tensors to load into: as a parameter is laid out where shapes agree, else plain ones."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    empty: dict[str, dict[str, Tensor]] = {}
    params = _optimized(model, optimizer)
    for key, stored in metadata.items():
        name, _, field = key.removeprefix(prefix).rpartition(".")
        if not key.startswith(prefix) or name not in params:
            continue
        param, dtype = params[name], stored.properties.dtype
        if tuple(stored.size) == tuple(param.shape):
            tensor = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        else:  # the step count, which fused kernels want on their device
            tensor = torch.zeros(stored.size, dtype=dtype, device=param.device if fused else "cpu")
        empty.setdefault(name, {})[field] = tensor
    return empty


# ---- one file for inference


def consolidate_checkpoints(ckpt_dir: str | os.PathLike) -> Path:
    """Gather a checkpoint's weights into `consolidated/consolidated.pth`; returns that folder.

    The file holds {"model": {name: tensor}} and nothing else. It appears whole or not at all; if
    it and its config are there, nothing is done. For one process: others wait for it in
    `run_on_rank_0`.
    """
    source = Path(ckpt_dir)
    folder = source / CONSOLIDATE_FOLDER
    target = folder / CONSOLIDATE_NAME
    if target.is_file() and (folder / CONFIG_NAME).is_file():
        return folder
    for name in (METADATA_NAME, CONFIG_NAME):
        if not (source / name).is_file():
            raise UserError(f"{source} is no checkpoint folder: it has no {name} file")
    reader = FileSystemReader(source)
    prefix = f"{MODEL_KEY}."
    weights = {
        key.removeprefix(prefix): torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }
    with _dcp():
        dcp.load({MODEL_KEY: weights}, storage_reader=reader, no_dist=True)

    folder.mkdir(exist_ok=True)
    write_atomic(folder / CONFIG_NAME, (source / CONFIG_NAME).read_bytes())
    with open_atomic(target) as f:
        torch.save({MODEL_KEY: weights}, f)
    logger.info(f"consolidated weights in {target}")
    return folder


@contextlib.contextmanager
def _dcp() -> Iterator[None]:
    """Mend two habits of DCP.

    It warns about a missing process group even where it was told that there is none, and its
    exception is not an Exception.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (cause, _) = sorted(error.failures.items())[0]
        reason = str(cause).partition("\n")[0]
        raise RuntimeError(f"rank {rank}: {type(cause).__name__}: {reason}") from error
