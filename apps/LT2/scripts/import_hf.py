"""Import a Hugging Face Llama folder, for generate, eval and train.

    python -m apps.LT2.scripts.import_hf hf=Llama-folder out=llama
    python -m apps.LT2.generate ckpt=llama

Read config.json, model.safetensors (or its shards) and tokenizer.json. Write consolidated.pth with
tensors of the same dtype, params.json and the tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from apps.LT2.scripts.llama import from_llama, read_llama_config
from apps.LT2.scripts.weight_folder import copy_tokenizer, new_folder, write_json
from apps.LT2.transformer import LoopedTransformerArgs, build_on_meta
from lingua.args import parse_args
from lingua.checkpointing.dcp import CONFIG_NAME, check_fits
from lingua.checkpointing.weights import (
    CONSOLIDATE_NAME,
    SAFETENSORS_NAME,
    read_weights,
    write_weights,
)
from lingua.errors import UserError, run_cli
from lingua.tokenizer import TOKENIZERS, TokenizerArgs, build_tokenizer

INDEX_NAME = f"{SAFETENSORS_NAME}.index.json"


@dataclass(kw_only=True)
class ImportArgs:
    hf: str  # folder with config.json, model.safetensors and tokenizer.json
    out: str  # new folder
    # tokenizer of the model; a null path means the file in the folder hf
    tokenizer: TokenizerArgs = field(default_factory=lambda: TokenizerArgs(name="hf"))


def import_llama(args: ImportArgs) -> None:
    with new_folder(args.out) as folder:
        source = Path(args.hf)
        config = read_json(source / "config.json")
        model_args = read_llama_config(config, f"hf={args.hf}: config.json")
        tokenizer = find_tokenizer(args, model_args)
        weights = from_llama(read_folder(source), model_args, f"hf={args.hf}")
        model = build_on_meta(model_args)
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        check_fits(f"hf={args.hf}", model.state_dict(), shapes, may_leave_out=False)
        copy_tokenizer(folder, tokenizer)
        data = {"tokenizer": asdict(tokenizer)}
        write_json(folder / CONFIG_NAME, {"model": asdict(model_args), "data": data})
        write_weights(folder / CONSOLIDATE_NAME, weights, metadata={})


def find_tokenizer(args: ImportArgs, model_args: LoopedTransformerArgs) -> TokenizerArgs:
    """Return the tokenizer with an absolute path. UserError if it does not fit the model."""
    tokenizer = args.tokenizer
    if tokenizer.path is None and TOKENIZERS[tokenizer.name][1] is not None:
        tokenizer = replace(tokenizer, path=args.hf)
    if tokenizer.path is not None:
        tokenizer = replace(tokenizer, path=str(Path(tokenizer.path).resolve()))
    try:
        n_words = build_tokenizer(tokenizer.name, tokenizer.path).n_words
    except UserError as error:
        raise UserError(str(error).replace("data.tokenizer.", "tokenizer.")) from None
    if n_words > model_args.vocab_size:
        raise UserError(
            f"tokenizer.name={tokenizer.name} has {n_words} tokens, more than the vocabulary of "
            f"hf={args.hf}, {model_args.vocab_size}; give the model's tokenizer"
        )
    return tokenizer


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of the folder, from one file or from the shards in its index."""
    if (folder / SAFETENSORS_NAME).is_file():
        return read_weights(folder / SAFETENSORS_NAME, "hf")
    if not (folder / INDEX_NAME).is_file():
        raise UserError(
            f"hf={folder} has no {SAFETENSORS_NAME} and no {INDEX_NAME}; convert other formats "
            "with transformers' save_pretrained"
        )
    shards = set(read_json(folder / INDEX_NAME)["weight_map"].values())
    weights: dict[str, Tensor] = {}
    for name in sorted(shards):
        weights |= read_weights(folder / name, "hf")
    return weights


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"hf={file.parent}: {file.name} is not readable: {error}") from None


def main(argv: list[str]) -> None:
    args = parse_args(ImportArgs, argv, prog="python -m apps.LT2.scripts.import_hf", doc=__doc__)
    import_llama(args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main)
