"""Load a checkpoint for inference: weights, config and tokenizer.

    model, tokenizer, config = load_model_and_tokenizer("runs/demo", dtype="auto", device="auto")

Weight matrices are cast to `dtype`. All other parameters (norms, gates, decays, convolutions, see
`lingua.optim.is_matrix`) stay in fp32, as in training. Optimizer state is not read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from apps.LT2.exits import check_exit
from apps.LT2.inference.quantize import check_weights, quantize_int8
from apps.LT2.kernel import check_gpu_stack
from apps.LT2.kernel.attention import check_attention_device
from apps.LT2.kernel.decode_linear import KERNEL_DTYPES
from apps.LT2.kernel.decode_linear.triton import MAX_NORM_K
from apps.LT2.kernel.gated_delta_rule.decode import fits
from apps.LT2.kernel.tuning import tuning_mode
from apps.LT2.mixers import MIXERS, Mixer
from apps.LT2.mixers.gdn import GatedDeltaNet
from apps.LT2.transformer import (
    ZERO_IF_MISSING,
    LoopedTransformer,
    LoopedTransformerArgs,
    build_on_meta,
    fit_loop_gates,
)
from lingua.args import dataclass_from_dict
from lingua.checkpoint import CONFIG_NAME, find_checkpoint
from lingua.checkpointing.dcp import check_fits, missing_as_zero
from lingua.checkpointing.weights import read_weights, weight_dtype
from lingua.errors import UserError
from lingua.parallel.args import DTYPES, resolve_dtype
from lingua.parallel.ranks import get_device
from lingua.tokenizer import (
    TOKENIZERS,
    NoTokenizer,
    Tokenizer,
    TokenizerArgs,
    build_tokenizer,
    with_sha256,
)
from lingua.transformer import FeedForward, fuse_weights

logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    model: LoopedTransformer  # in eval mode, without gradients
    tokenizer: Tokenizer
    config: dict[str, Any]  # the whole config of the training run


def load_model_and_tokenizer(
    ckpt: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    loop_count: int | None = None,
    tokenizer_path: str | None = None,
    weights: str = "auto",
    exit: str = "none",
) -> LoadedModel:
    """Load a run's dump folder (its newest checkpoint), a step folder, or a weight file.

    `loop_count` replaces the number of loops of training; `tokenizer_path` is the new place of a
    tokenizer file that has moved; `weights="int8"` is for `quantize_int8`. The model must be able
    to follow the rule `exit`, which it doesn't keep. UserError if the parts do not fit together.
    """
    check_dtype(dtype)
    on = resolve_device(device)
    matrix_dtype = resolve_dtype(dtype, on.type)
    check_weights(weights, on, matrix_dtype)
    source = find_checkpoint(ckpt)
    config = read_config(source)
    tokenizer = _build_tokenizer(source, config, tokenizer_path)
    has_text = not isinstance(tokenizer, NoTokenizer)
    if has_text and config["data"].get("add_bos") and tokenizer.bos_id < 0:
        logger.warning(
            "data.add_bos=true in training, but the tokenizer has no bos token: using none"
        )
    args = _model_args(config, tokenizer, source)
    args = args.with_loops(args.loop_count)  # without a schedule
    n_loops = args.loop_count if loop_count is None else loop_count
    args.layout_of(n_loops)  # UserError before the weights are read
    check_exit(exit, args, n_loops)
    args = _fit_to_device(args, on.type, matrix_dtype)
    model = build_on_meta(args)
    tensors = read_weights(source, "ckpt", device=on, matrix_dtype=matrix_dtype)
    if "rho" in tensors and args.use_residual:
        tensors["rho"] = fit_loop_gates(tensors["rho"], args.loop_count)
    for name in missing_as_zero(str(source), model.state_dict(), tensors, ZERO_IF_MISSING):
        tensors[name] = torch.zeros_like(model.get_parameter(name), device=on)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_fits(f"ckpt={source}", model.state_dict(), shapes, may_leave_out=False)
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False).eval()
    model.set_loops(n_loops)
    if n_loops > args.loop_count and args.use_residual:
        logger.warning(
            "loop_count=%d on weights trained with %d loops: extra loops reuse the last residual "
            "gate",
            *(n_loops, args.loop_count),
        )
    if on.type == "cuda":  # fusing copies the weights, which may be memory-mapped on a CPU
        fuse_projections(model)
    if weights == "int8":
        quantize_int8(model)
    return LoadedModel(model, tokenizer, config)


def check_dtype(dtype: str) -> None:
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype={dtype} must be one of auto, {', '.join(DTYPES)}")


def resolve_device(device: str) -> torch.device:
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    choices = ["auto", "cpu", *(["cuda", *gpus] if gpus else [])]
    if device not in choices:
        raise UserError(f"device={device} must be one of {', '.join(choices)} on this machine")
    return get_device() if device in ("auto", "cuda") else torch.device(device)


def read_config(source: Path) -> dict[str, Any]:
    """Read the run's config from the folder of its weights."""
    folder = source if source.is_dir() else source.parent
    file = folder / CONFIG_NAME
    if not file.is_file() and (folder / "config.json").is_file():
        raise UserError(
            f"ckpt={source}: this is a Hugging Face folder; convert it with "
            f"python -m apps.LT2.scripts.import_hf hf={folder} out=..."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"ckpt={source}: {file}, which describes the model, is missing; "
            "the checkpoint is incomplete or from another program"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"ckpt={source}: {file} is not readable: {error}") from None
    if missing := sorted({"model", "data"} - config.keys()):
        raise UserError(f"ckpt={source}: {file} has no section `{missing[0]}`")
    return config


def resolve_tokenizer(source: Path, config: Mapping[str, Any], path: str | None) -> TokenizerArgs:
    """Locate the tokenizer file: at `path`, next to a weight file, or where training found it."""
    saved = dataclass_from_dict(TokenizerArgs, config["data"]["tokenizer"])
    if path is not None and saved.path is None:
        raise UserError(f"tokenizer_path={path}: the tokenizer {saved.name} has no file")
    file_name = TOKENIZERS[saved.name][1]
    if path is None and source.is_file() and file_name and (source.parent / file_name).is_file():
        path = str(source.parent / file_name)
    return saved if path is None else replace(saved, path=path)


def training_window(config: Mapping[str, Any]) -> int:
    """Return the sequence length that the model was trained with."""
    return config["model"].get("max_seqlen", LoopedTransformerArgs.max_seqlen)


def _build_tokenizer(source: Path, config: Mapping[str, Any], path: str | None) -> Tokenizer:
    if (task := config["data"].get("task")) is not None:
        return NoTokenizer(f"ckpt={source} was trained on data.task.name={task.get('name')}")
    args = resolve_tokenizer(source, config, path)
    try:
        tokenizer = build_tokenizer(args.name, args.path)
    except UserError as error:
        if path is not None or args.path is None:
            raise
        raise UserError(f"{error}; if the file has moved, set tokenizer_path=...") from None
    if args.sha256 not in (None, with_sha256(args).sha256):
        problem = f"{args.path} is not the tokenizer of training (data.tokenizer.sha256 differs)"
        if path is None:
            raise UserError(
                f"ckpt={source}: {problem}; restore the file, or set tokenizer_path=... to its "
                "copy or to another tokenizer"
            )
        logger.warning("tokenizer_path=%s", problem)
    return tokenizer


def _model_args(
    config: Mapping[str, Any], tokenizer: Tokenizer, source: Path
) -> LoopedTransformerArgs:
    options = config["model"]
    if "loop_count" not in options and (window := options.get("sliding_window")) is not None:
        logger.warning("model.sliding_window=%d is not used: Lingua trains without it", window)
        options = {**options, "sliding_window": None}
    try:
        args = dataclass_from_dict(LoopedTransformerArgs, options)
    except UserError as error:
        raise UserError(f"ckpt={source}: {CONFIG_NAME}, section model: {error}") from None
    if args.vocab_size < tokenizer.n_words:
        raise UserError(
            f"ckpt={source}: model.vocab_size={args.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.n_words} tokens; use the tokenizer of the training run"
        )
    return args


def _fit_to_device(
    args: LoopedTransformerArgs, device_type: str, dtype: torch.dtype
) -> LoopedTransformerArgs:
    """Replace an attention backend that does not work here; the weights do not depend on it."""
    check_kernels(args, device_type)
    try:
        check_attention_device(args.attn_impl, device_type=device_type, dtype=dtype)
        return args
    except UserError as error:
        logger.warning(f"using model.attn_impl=auto: {error}")
        return replace(args, attn_impl="auto")


def check_kernels(args: LoopedTransformerArgs, device_type: str) -> None:
    """Raise UserError on a GPU machine that cannot run these mixers, and for a wrong LT2_TUNE."""
    tuning_mode()
    mixers = {MIXERS[spec.mixer] for loop in args.layout() for spec in loop}
    if device_type == "cuda" and any(mixer.uses_fla for mixer in mixers):
        check_gpu_stack()


def cast_for_inference(model: nn.Module, matrix_dtype: torch.dtype) -> None:
    """Cast weight matrices to `matrix_dtype` and all other parameters to fp32, in place."""
    for name, param in model.named_parameters():
        param.data = param.data.to(weight_dtype(name, param.data, matrix_dtype))


def fuse_projections(model: LoopedTransformer) -> None:
    """Fuse the weights of linears that read the same input, in place, for decoding.

    Warns once if decode steps on a GPU can't use all of their kernels.
    """
    for module in model.modules():
        if isinstance(module, Mixer):
            fuse_weights(module.decode_linears() or module.fused_linears())
            fuse_weights((module.wo,))
        elif isinstance(module, FeedForward):
            fuse_weights(module.fused_linears())
            fuse_weights((module.w2,))
    weight = model.tok_embeddings.weight
    if weight.is_cuda and (why := plain_steps(model, weight.dtype)) is not None:
        logger.warning(f"decode steps run slower kernels: {why}")


def plain_steps(model: LoopedTransformer, dtype: torch.dtype) -> str | None:
    """Return why decode steps on a GPU can't use all of their kernels, or None."""
    if dtype not in KERNEL_DTYPES:
        return "the fast ones need dtype=bf16 or fp16"
    if model.args.dim > MAX_NORM_K:
        return f"the fast ones need model.dim={model.args.dim} of at most {MAX_NORM_K}"
    for module in model.modules():
        if isinstance(module, GatedDeltaNet) and not fits(module.key_dim, module.value_dim):
            size = f"{module.key_dim} x {module.value_dim}"
            return f"the state of a gdn head, {size}, is too large for the fast one"
    return None
