"""Model and optimizer tensors in torch's distributed checkpoint format (DCP).

All ranks write one folder, and any number of ranks can read it. Keys are `model.<parameter>` and
`optim.state.<parameter>.<field>`. AdamW's fields are step, exp_avg and exp_avg_sq; Muon's field is
momentum_buffer. Learning rates and other hyperparameters come from the config, not from here.

torch.distributed.checkpoint.state_dict produces the same keys, but does not fit here. On a fresh
optimizer it takes a fake step, so `step` becomes 1. It requires state of parameters that were never
updated. Loading replaces the param_groups and the state dict, which Muon shares with its AdamW.
"""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.optim import Optimizer

from lingua.checkpointing.metadata import METADATA_NAME, MetadataReader, read_metadata
from lingua.errors import UserError, first_line
from lingua.logger import log_on_rank_0
from lingua.optim import state_fields

MODEL_KEY, OPTIM_KEY = "model", "optim"
# Lingua stores the weight of a tied head a second time.
TIED_COPY = "output.tied_module.weight"
CONFIG_NAME = "params.json"
Resize = Callable[[Tensor, int], Tensor]  # (stored tensor, rows of the model) -> the model's tensor


def load_from_checkpoint(
    ckpt_dir: str | os.PathLike,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    model_key: str = MODEL_KEY,
    optim_key: str = OPTIM_KEY,
    zero_if_missing: Sequence[str] = (),
    resized: Mapping[str, Resize] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Load a step folder into a model and optimizer, in place. A collective.

    An empty `model_key` means that the model's tensors have no prefix. Without an optimizer,
    stored weights that the model lacks are skipped with a warning; with one, they are a UserError.
    Weights that the folder lacks are set to zero if `zero_if_missing` lists them. Otherwise they
    are a UserError, as are other shapes, unless `resized` has a function that fits the stored
    tensor to the model's rows. Returns the stored shapes by name.
    """
    folder = Path(ckpt_dir)
    require_files(folder, METADATA_NAME)
    metadata = read_metadata(folder)
    weights = model.state_dict()
    stored = {name: entry.size for name, entry in model_tensors(metadata, model_key).items()}
    for name in missing_as_zero(f"checkpoint {folder}", weights, stored, zero_if_missing):
        weights.pop(name).zero_()
    shapes, resized_names = {name: tuple(size) for name, size in stored.items()}, []
    for name in resized or {}:
        if name in weights and name in stored and weights[name].shape != stored[name]:
            resized_names.append(name)
            weights[name] = weights[name].new_empty(stored[name])
    if not model_key:  # the root may hold other tensors
        stored = {name: size for name, size in stored.items() if name in weights}
    check_fits(f"checkpoint {folder}", weights, stored, may_leave_out=optimizer is None)
    state: dict[str, Any] = {model_key: weights} if model_key else dict(weights)
    moments: dict[str, dict[str, Tensor]] = {}
    if optimizer is not None:
        moments_stored = tensors_under(f"{optim_key}.state", metadata)
        moments = _empty_optimizer_state(folder, model, optimizer, moments_stored)
        state[optim_key] = {"state": moments}
    read_tensors(folder, state, is_collective=dist.is_initialized())
    for name in resized_names:
        target = model.get_parameter(name)
        with torch.no_grad():
            target.copy_((resized or {})[name](weights[name], len(target)))
    if optimizer is not None:
        for name, param in _optimized(model, optimizer).items():
            optimizer.state[param] = moments.get(name, {})
    return shapes


def require_files(folder: Path, *names: str, option: str = "") -> None:
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{option}{folder} is not a checkpoint folder: {name} is missing; name a folder "
                "such as <dump_dir>/checkpoints/0000001000"
            )


def model_tensors(
    metadata: Metadata, model_key: str = MODEL_KEY
) -> dict[str, TensorStorageMetadata]:
    """Return size and dtype of the stored weights."""
    stored = tensors_under(model_key, metadata)
    stored.pop(TIED_COPY, None)
    return stored


def tensors_under(prefix: str, metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return size and dtype of the stored tensors whose key starts with `prefix`, without it."""
    prefix = f"{prefix}." if prefix else ""
    return {
        key.removeprefix(prefix): entry
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(folder: Path, state: dict[str, Any], *, is_collective: bool) -> None:
    """Fill the tensors of a nested `state` in place; RuntimeError if a file is not readable.

    UserError if a file holds more than tensors. Ctrl-C stays KeyboardInterrupt.
    """
    try:
        with warnings.catch_warnings():  # DCP warns even if no_dist is set
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader, planner = MetadataReader(folder), _TensorPlanner()
            dcp.load(state, storage_reader=reader, planner=planner, no_dist=not is_collective)
    except CheckpointException as error:  # a BaseException
        rank, (cause, _) = sorted(error.failures.items())[0]
        if isinstance(cause, UserError | KeyboardInterrupt):
            raise cause from None
        if isinstance(cause, pickle.UnpicklingError):
            raise not_only_tensors(f"a .distcp file in {folder}") from None
        message = f"rank {rank}: {type(cause).__name__}: {first_line(cause)}"
        raise RuntimeError(message) from error


class _TensorPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Refuse an entry that is not a tensor: torch would unpickle it."""
        raise ValueError(f"{read_item.storage_index.fqn!a} is not a tensor")


def not_only_tensors(file: str) -> UserError:
    """Return the error for a file that torch refuses to unpickle. Its own advises to unpickle."""
    return UserError(
        f"{file} holds more than tensors; nothing in it was run. Do not use this checkpoint unless "
        "you know who wrote it"
    )


def find_missing_tensors(folder: Path) -> str | None:
    """Describe the first tensor of the index that the files are too short for."""
    for key, place in (read_metadata(folder).storage_data or {}).items():
        file = folder / place.relative_path
        if not file.is_file() or file.stat().st_size < place.offset + place.length:
            return f"{file.name} does not contain {key.fqn}"
    return None


def missing_as_zero(
    source: str, weights: Mapping[str, Any], stored: Mapping[str, Any], names: Sequence[str]
) -> list[str]:
    """Return those of `names` that the model has and `source` lacks, and log them."""
    missing = [name for name in names if name in weights and name not in stored]
    if missing:
        log_on_rank_0("%s has no %s: set to zero", source, missing[0], level=logging.WARNING)
    return missing


def check_fits(
    source: str,
    weights: Mapping[str, Tensor],
    stored: Mapping[str, tuple[int, ...]],
    *,
    may_leave_out: bool,
) -> None:
    """Raise UserError unless a model's `weights` and the `stored` tensors have the same shapes.

    With `may_leave_out`, stored tensors that the model lacks are only a warning.
    """
    model = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    file = {name: tuple(size) for name, size in stored.items()}
    wrong = sorted(n for n in model.keys() | file.keys() if model.get(n) != file.get(n))
    unused = [name for name in wrong if name not in model]
    if may_leave_out and unused:
        log_on_rank_0(
            "not loaded from %s, unknown to the model: %s", source, unused, level=logging.WARNING
        )
        wrong = [name for name in wrong if name in model]
    if wrong:
        shapes = [
            f"{name}: {file.get(name, 'missing')} in the checkpoint, "
            f"{model.get(name, 'missing')} in the model"
            for name in wrong[:3]
        ]
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"{source} does not fit the model: {'; '.join(shapes)}{more}")


# ---- optimizer state by parameter name


def tensors_to_save(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    # The order matters: state_dict makes FSDP register the sharded parameters, which the optimizer
    # knows. A forward without backward (validation) leaves the gathered ones registered.
    state: dict[str, Any] = {MODEL_KEY: model.state_dict()}
    if optimizer is not None:
        state[OPTIM_KEY] = {"state": optimizer_state(model, optimizer)}
    return state


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's own tensors by parameter name, for parameters that have any."""
    return {
        name: dict(optimizer.state[param])
        for name, param in _optimized(model, optimizer).items()
        if optimizer.state.get(param)
    }


def _optimized(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    names = {param: name for name, param in model.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(p in names for p in params), "the optimizer holds parameters of another model"
    return {names[param]: param for param in params}


def _empty_optimizer_state(
    folder: Path, model: nn.Module, optimizer: Optimizer, stored: dict[str, TensorStorageMetadata]
) -> dict[str, dict[str, Tensor]]:
    """Allocate the `stored` state, sharded like the parameter where the shapes agree."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    params, wanted = _optimized(model, optimizer), state_fields(optimizer)
    empty: dict[str, dict[str, Tensor]] = {}
    for key, entry in stored.items():
        name, _, field = key.rpartition(".")
        if name not in params:
            continue
        param, dtype = params[name], entry.properties.dtype
        if tuple(entry.size) == tuple(param.shape):
            tensor = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        else:  # the step count; fused kernels need it on their device
            tensor = torch.zeros(entry.size, dtype=dtype, device=param.device if fused else "cpu")
        empty.setdefault(name, {})[field] = tensor
    for name, found in empty.items():
        if found.keys() != wanted[params[name]]:
            raise UserError(
                f"optim.name: for {name}, checkpoint {folder} has {', '.join(sorted(found))}; this "
                f"optimizer needs {', '.join(sorted(wanted[params[name]]))}. Keep the saved "
                "optim.name, or start a new run from the weights with checkpoint.init_ckpt_path"
            )
    return empty
