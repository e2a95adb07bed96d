"""Export the weights of a checkpoint, without its optimizer, to a new folder.

    python -m apps.LT2.scripts.export_weights ckpt=runs/demo format=safetensors out=demo

    consolidated   consolidated.pth, for torch.load
    safetensors    model.safetensors, the same tensors
    hf             a folder for transformers: a Llama, Qwen2 or Qwen3 for one loop of full
                   attention, else LT2ForCausalLM, whose code is in the folder

The first two come with params.json and the tokenizer file. Every `ckpt=` option takes the folder.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from apps.LT2.huggingface.export import write_model, write_shards
from apps.LT2.huggingface.model_card import write_model_card
from apps.LT2.huggingface.tokenizer import save_tokenizer
from apps.LT2.inference.load import (
    LoadedModel,
    load_model_and_tokenizer,
    read_config,
    resolve_tokenizer,
)
from apps.LT2.scripts.llama import check_is_llama, llama_config, to_llama
from apps.LT2.scripts.weight_folder import copy_tokenizer, new_folder, write_json
from lingua.args import parse_args
from lingua.checkpoint import find_checkpoint
from lingua.checkpointing.dcp import CONFIG_NAME
from lingua.checkpointing.weights import (
    CONSOLIDATE_NAME,
    SAFETENSORS_NAME,
    check_can_write,
    write_weights,
)
from lingua.errors import UserError, run_cli
from lingua.parallel.args import DTYPES
from lingua.tokenizer import with_sha256

logger = logging.getLogger(__name__)

FILES = {"consolidated": CONSOLIDATE_NAME, "safetensors": SAFETENSORS_NAME, "hf": SAFETENSORS_NAME}


@dataclass(kw_only=True)
class ExportArgs:
    POSITIONAL: ClassVar = "ckpt"
    ALIASES: ClassVar = {"ckpt_dir": "ckpt", "dump_dir": "ckpt"}

    ckpt: str  # a run's dump_dir (newest checkpoint), a step folder, or a file of weights
    format: str  # consolidated, safetensors, or hf (a Hugging Face folder)
    out: str  # new folder
    dtype: str = "fp32"  # fp32, bf16 or fp16; 1-D parameters stay fp32, except a Llama's
    tokenizer_path: str | None = None  # tokenizer file; null = the one of training

    def __post_init__(self) -> None:
        if self.format not in FILES:
            raise UserError(f"format={self.format} must be one of {', '.join(FILES)}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype} must be one of {', '.join(DTYPES)}")


def export(args: ExportArgs) -> None:
    check_can_write(FILES[args.format], f"format={args.format}")
    with new_folder(args.out) as folder:
        source = find_checkpoint(args.ckpt)
        config = read_config(source)
        if args.format == "hf" and (task := config["data"].get("task")):
            raise UserError(
                f"format=hf: ckpt={source} was trained on data.task.name={task.get('name')}, which "
                "has no tokenizer; use format=safetensors"
            )
        tokenizer = resolve_tokenizer(source, config, args.tokenizer_path)
        loaded = load_model_and_tokenizer(
            str(source), dtype=args.dtype, device="cpu", tokenizer_path=args.tokenizer_path
        )
        if args.format == "hf":
            add_bos = bool(loaded.config["data"].get("add_bos", True))
            tokens = save_tokenizer(tokenizer, folder, add_bos=add_bos)
            write_hf_model(folder, loaded, args.dtype, tokens)
            if left_out := options_left_out(loaded):
                logger.warning("format=hf leaves out the options of training loops: %s", left_out)
            write_model_card(folder, loaded, source)
        else:
            loaded.config["data"]["tokenizer"] = asdict(with_sha256(tokenizer))
            write_json(folder / CONFIG_NAME, loaded.config)
            copy_tokenizer(folder, tokenizer)
            weights = loaded.model.state_dict()
            write_weights(folder / FILES[args.format], weights, metadata={"format": "pt"})


def options_left_out(loaded: LoadedModel) -> str:
    """Name the options of training loops that a Hugging Face folder doesn't have."""
    trained, kept = loaded.config["model"], loaded.model.args
    names = ("loop_schedule", "loop_sample", "loop_bptt", "loop_loss")
    return ", ".join(
        f"model.{name}={trained[name]}"
        for name in names
        if trained.get(name, getattr(kept, name)) != getattr(kept, name)
    )


def write_hf_model(
    folder: Path, loaded: LoadedModel, dtype: str, tokens: Mapping[str, int]
) -> None:
    """Write a Llama if the model is one, else the model with its code.

    tokens: ids of special tokens, such as {"eos_token_id": 2}
    """
    args, weights = loaded.model.args, loaded.model.state_dict()
    try:
        check_is_llama(args, weights)
    except UserError:
        write_model(folder, args, weights, dtype=DTYPES[dtype], tokens=tokens)
        return
    weights, config = as_llama(loaded, dtype)
    write_json(folder / "config.json", {**config, **tokens})
    write_shards(folder, weights)


def as_llama(loaded: LoadedModel, dtype: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors of one dtype, as transformers stores them, and config.json."""
    args, weights = loaded.model.args, loaded.model.state_dict()
    config = llama_config(args, weights, loaded.tokenizer, DTYPES[dtype])
    theirs = to_llama(weights, args)
    return {name: weight.to(DTYPES[dtype]) for name, weight in theirs.items()}, config


def main(argv: list[str]) -> None:
    args = parse_args(
        ExportArgs, argv, prog="python -m apps.LT2.scripts.export_weights", doc=__doc__
    )
    # Without a handler, a SIGTERM would leave the temporary folder.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    export(args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main)
