"""A checkpoint becomes a model: weights, config and tokenizer, ready for inference.

    model, tokenizer, config = load_model_and_tokenizer("runs/demo", dtype="auto", device="auto")

Optimizer states are not read. Weight matrices are cast to `dtype`; vectors (norms, gates, decays,
convolutions: what `lingua.optim.is_matrix` says no to) stay in fp32, as in training.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from apps.LT2.kernel import check_gpu_stack
from apps.LT2.kernel.attention import check_attention_device
from apps.LT2.mixers import MIXERS, Mixer
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs, fit_loop_gates
from lingua.args import dataclass_from_dict
from lingua.checkpoint import (
    CONFIG_NAME,
    CONSOLIDATE_NAME,
    CheckpointArgs,
    CheckpointManager,
    load_from_checkpoint,
)
from lingua.checkpointing.dcp import METADATA_NAME, MODEL_KEY
from lingua.checkpointing.folder import MANIFEST_NAME, find_problem
from lingua.checkpointing.weights import SAFETENSORS_NAME, find_weight_file, read_weights
from lingua.errors import UserError
from lingua.optim import is_matrix
from lingua.parallel.args import DTYPES, resolve_dtype
from lingua.parallel.ranks import get_device
from lingua.tokenizer import TOKENIZERS, Tokenizer, TokenizerArgs, build_tokenizer
from lingua.transformer import FeedForward, fuse_weights

logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    model: LoopedTransformer  # in eval mode, without gradients
    tokenizer: Tokenizer
    config: dict[str, Any]  # the run's whole config, as it saved it


def load_model_and_tokenizer(
    ckpt: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    loop_count: int | None = None,
    tokenizer_path: str | None = None,
) -> LoadedModel:
    """Load a run's dump folder (its newest checkpoint), a step folder, or a file of weights alone.

    `loop_count` runs the stack another number of times than in training; `tokenizer_path` says
    where the tokenizer's file lies now. What does not fit is a UserError.
    """
    check_dtype(dtype)
    on = resolve_device(device)
    matrix_dtype = resolve_dtype(dtype, on.type)
    source = find_checkpoint(ckpt)
    config = read_config(source)
    tokenizer = _build_tokenizer(source, config, tokenizer_path)
    trained = _model_args(config, tokenizer, source)
    args = replace(trained, loop_count=trained.loop_count if loop_count is None else loop_count)
    args = _fit_to_device(args, on.type, matrix_dtype)
    with torch.device("meta"):
        model = LoopedTransformer(args)
    if source.is_dir():
        weights = _read_step_folder(source, trained, on, matrix_dtype)
    else:
        weights = {
            name: _cast(name, tensor, on, matrix_dtype)
            for name, tensor in read_weights(source, "ckpt").items()
        }
    if "rho" in weights and args.use_residual:
        weights["rho"] = fit_loop_gates(weights["rho"], args.loop_count)
    _check_fits(source, model, {name: tuple(t.shape) for name, t in weights.items()})
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval()
    if on.type == "cuda":  # on a CPU mapped files stay mapped
        fuse_projections(model)
    return LoadedModel(model, tokenizer, config)


def check_dtype(dtype: str) -> None:
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype={dtype} must be one of auto, {', '.join(DTYPES)}")


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return get_device()
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or (chosen.type != "cuda" and device != "cpu"):
        raise UserError(f"device={device} must be auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if (chosen.index or 0) >= count:
            there = f"cuda:0 to cuda:{count - 1}, or " if count else ""
            raise UserError(f"device={device}: this machine shows {count} GPUs; use {there}cpu")
        return get_device() if chosen.index is None else chosen
    return chosen


def find_checkpoint(ckpt: str) -> Path:
    """The step folder, or the file of weights, that `ckpt` means."""
    path = Path(ckpt)
    if not ckpt or not path.exists():
        raise UserError(f"ckpt={ckpt}: no such file or folder (seen from {Path.cwd()})")
    if (path / METADATA_NAME).is_file():
        return path
    file = find_weight_file(path)
    if file is not None:
        return file
    for folder in (path / "checkpoints", path):
        newest = CheckpointManager(CheckpointArgs(path=str(folder))).get_last_step_path()
        if newest is not None:
            return newest
    raise UserError(
        f"ckpt={ckpt} holds no complete checkpoint: give a run's dump_dir, a step folder such as "
        f"<dump_dir>/checkpoints/0000001000, or a {CONSOLIDATE_NAME} or {SAFETENSORS_NAME}"
    )


def read_config(source: Path) -> dict[str, Any]:
    """The run's config from beside its weights."""
    folder = source if source.is_dir() else source.parent
    file = folder / CONFIG_NAME
    if not file.is_file() and (folder / "config.json").is_file():
        raise UserError(
            f"ckpt={source}: this is a Hugging Face folder; make it one of ours with "
            f"python -m apps.LT2.scripts.import_hf hf={folder} out=..."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"ckpt={source}: {file} is missing, which says what model this is; "
            "the checkpoint is incomplete, or no run of this program wrote it"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"ckpt={source}: {file} is not readable: {error}") from None
    for option in ("model", "data.tokenizer"):
        section = config
        for key in option.split("."):
            section = section.get(key) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise UserError(f"ckpt={source}: {file} has no section `{option}`")
    return config


def resolve_tokenizer(source: Path, config: Mapping[str, Any], path: str | None) -> TokenizerArgs:
    """The run's tokenizer, its file at `path`, beside a file of weights, or where it was."""
    saved = dataclass_from_dict(TokenizerArgs, config["data"]["tokenizer"])
    if path is not None and saved.path is None:
        raise UserError(f"tokenizer_path={path}: the tokenizer {saved.name} has no file")
    file_name = TOKENIZERS[saved.name][1]
    if path is None and source.is_file() and file_name and (source.parent / file_name).is_file():
        path = str(source.parent / file_name)
    return saved if path is None else replace(saved, path=path)


def _build_tokenizer(source: Path, config: Mapping[str, Any], path: str | None) -> Tokenizer:
    saved = resolve_tokenizer(source, config, path)
    if path is None:
        try:
            return build_tokenizer(saved.name, saved.path)
        except UserError as error:
            if saved.path is None:
                raise
            raise UserError(f"{error}; if it has moved, say tokenizer_path=...") from None
    return build_tokenizer(saved.name, saved.path)


def _model_args(
    config: Mapping[str, Any], tokenizer: Tokenizer, source: Path
) -> LoopedTransformerArgs:
    try:
        args = dataclass_from_dict(LoopedTransformerArgs, config["model"])
    except UserError as error:
        raise UserError(f"ckpt={source}: {CONFIG_NAME}, section model: {error}") from None
    if args.vocab_size < tokenizer.n_words:
        raise UserError(
            f"ckpt={source}: the model has a vocabulary of {args.vocab_size} pieces and its "
            f"tokenizer one of {tokenizer.n_words}: this is not the tokenizer of the training run"
        )
    return args


def _fit_to_device(
    args: LoopedTransformerArgs, device_type: str, dtype: torch.dtype
) -> LoopedTransformerArgs:
    """The backend that a run trained with is not part of its weights: take one that works here."""
    check_kernels(args, device_type)
    try:
        check_attention_device(args.attn_impl, device_type=device_type, dtype=dtype)
        return args
    except UserError as error:
        logger.warning(f"using model.attn_impl=auto: {error}")
        return replace(args, attn_impl="auto")


def check_kernels(args: LoopedTransformerArgs, device_type: str) -> None:
    """Refuse a GPU machine on which kernels of these mixers do not run."""
    mixers = {MIXERS[spec.mixer] for loop in args.layout() for spec in loop}
    if device_type == "cuda" and any(mixer.uses_fla for mixer in mixers):
        check_gpu_stack()


def cast_for_inference(model: nn.Module, matrix_dtype: torch.dtype) -> None:
    """Matrices to `matrix_dtype` and vectors to fp32, in place."""
    for name, param in model.named_parameters():
        param.data = _cast(name, param.data, param.device, matrix_dtype)


def fuse_projections(model: LoopedTransformer) -> None:
    """Lay the weights of linears that read the same input side by side, in place, for decoding."""
    for module in model.modules():
        if isinstance(module, Mixer | FeedForward):
            fuse_weights(module.fused_linears())


def _cast(name: str, tensor: Tensor, device: torch.device, matrix_dtype: torch.dtype) -> Tensor:
    dtype = matrix_dtype if is_matrix(name, tensor) else torch.float32
    return tensor.to(device=device, dtype=dtype)


def _read_step_folder(
    folder: Path, args: LoopedTransformerArgs, device: torch.device, matrix_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights by name. They are read into tensors that already have their device and dtype."""
    problem = find_problem(folder) if (folder / MANIFEST_NAME).exists() else None
    if problem is not None:
        raise UserError(f"ckpt={folder}: the checkpoint is damaged: {problem}; take another one")
    with torch.device("meta"):
        model = LoopedTransformer(args)
    cast_for_inference(model, matrix_dtype)
    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        prefix = f"{MODEL_KEY}."
        sizes = {
            key.removeprefix(prefix): tuple(entry.size)
            for key, entry in stored.items()
            if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        _check_fits(folder, model, sizes)
        model.to_empty(device=device)
        load_from_checkpoint(folder, model)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"ckpt={folder}: the checkpoint is not readable: {reason}") from None
    return model.state_dict()


def _check_fits(source: Path, model: nn.Module, given: Mapping[str, tuple[int, ...]]) -> None:
    """Names and shapes that are `given` must be all that the model has, and no more."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    wrong = sorted(
        name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)
    )
    if wrong:
        name = wrong[0]
        raise UserError(
            f"ckpt={source}: {len(wrong)} tensors do not fit the model of {CONFIG_NAME}, such as "
            f"{name}: {given.get(name, 'absent')} here, {wanted.get(name, 'absent')} in the model"
        )
