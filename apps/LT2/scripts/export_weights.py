"""Export the weights of a checkpoint, without its optimizer, to a new folder.

    python -m apps.LT2.scripts.export_weights ckpt=runs/demo format=safetensors out=demo

    consolidated   consolidated.pth, for torch.load
    safetensors    model.safetensors, the same tensors
    hf             a folder for transformers: a Llama, Qwen2 or Qwen3 for one loop of full
                   attention, else LT2ForCausalLM, whose code is in the folder

The first two come with params.json and the tokenizer file. Every `ckpt=` option takes the folder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from apps.LT2.huggingface.export import write_model, write_shards
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
from lingua.errors import UserError, import_optional, run_cli
from lingua.parallel.args import DTYPES
from lingua.tokenizer import CONFIG_NAME as TOKENIZER_CONFIG_NAME
from lingua.tokenizer import HuggingFaceTokenizer, TokenizerArgs, with_sha256

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
        tokenizer = resolve_tokenizer(source, read_config(source), args.tokenizer_path)
        loaded = load_model_and_tokenizer(
            str(source), dtype=args.dtype, device="cpu", tokenizer_path=args.tokenizer_path
        )
        if args.format == "hf":
            write_hf_model(folder, loaded, args.dtype)
            write_hf_tokenizer(folder, tokenizer, loaded)
        else:
            loaded.config["data"]["tokenizer"] = asdict(with_sha256(tokenizer))
            write_json(folder / CONFIG_NAME, loaded.config)
            copy_tokenizer(folder, tokenizer)
            weights = loaded.model.state_dict()
            write_weights(folder / FILES[args.format], weights, metadata={"format": "pt"})


def write_hf_model(folder: Path, loaded: LoadedModel, dtype: str) -> None:
    """Write a Llama if the model is one, else the model with its code."""
    args, weights, tokenizer = loaded.model.args, loaded.model.state_dict(), loaded.tokenizer
    try:
        check_is_llama(args, weights)
    except UserError:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        tokens = {name: token for name, token in ids.items() if token >= 0}
        write_model(folder, args, weights, dtype=DTYPES[dtype], tokens=tokens)
        return
    weights, config = as_llama(loaded, dtype)
    write_json(folder / "config.json", config)
    write_shards(folder, weights)


def as_llama(loaded: LoadedModel, dtype: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors of one dtype, as transformers stores them, and config.json."""
    args, weights = loaded.model.args, loaded.model.state_dict()
    config = llama_config(args, weights, loaded.tokenizer, DTYPES[dtype])
    theirs = to_llama(weights, args)
    return {name: weight.to(DTYPES[dtype]) for name, weight in theirs.items()}, config


def write_hf_tokenizer(folder: Path, tokenizer: TokenizerArgs, loaded: LoadedModel) -> None:
    if not isinstance(loaded.tokenizer, HuggingFaceTokenizer):
        print(f"the tokenizer {tokenizer.name} has no tokenizer.json, so the folder has none")
        return
    copy_tokenizer(folder, tokenizer)
    fit_special_tokens(folder / "tokenizer.json", loaded)
    config = folder / TOKENIZER_CONFIG_NAME
    if not config.exists():
        special = {
            f"{role}_token": loaded.tokenizer.model.id_to_token(token) if token >= 0 else None
            for role, token in (("bos", loaded.tokenizer.bos_id), ("eos", loaded.tokenizer.eos_id))
        }
        write_json(config, {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def fit_special_tokens(file: Path, loaded: LoadedModel) -> None:
    """Let transformers start a text with BOS if training did, and add no other token."""
    ours = loaded.tokenizer
    assert isinstance(ours, HuggingFaceTokenizer)
    add_bos = loaded.config["data"].get("add_bos", True) and ours.bos_id >= 0
    tokenizers = import_optional("tokenizers", extra="", needed_by="format=hf")
    theirs = tokenizers.Tokenizer.from_file(str(file))
    if theirs.encode("a").ids == ours.encode("a", add_bos, False):
        return
    bos = ours.model.id_to_token(ours.bos_id) if add_bos else None
    theirs.post_processor = bos and tokenizers.processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, ours.bos_id)]
    )
    theirs.save(str(file))


def main(argv: list[str]) -> None:
    args = parse_args(
        ExportArgs, argv, prog="python -m apps.LT2.scripts.export_weights", doc=__doc__
    )
    export(args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main)
