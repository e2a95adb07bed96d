"""Import a Hugging Face Llama folder, for generate, eval and train.

    python -m apps.LT2.scripts.import_hf hf=Llama-folder out=llama
    python -m apps.LT2.generate ckpt=llama

Read config.json, model.safetensors (or its shards) and tokenizer.json. Write consolidated.pth with
tensors of the same dtype, params.json and the tokenizer. Added tokens without a row in the
embedding, such as a <pad>, are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from apps.LT2.scripts.llama import from_llama, read_llama_config
from apps.LT2.scripts.weight_folder import copy_tokenizer, new_folder, write_json
from apps.LT2.transformer import build_on_meta
from lingua.args import parse_args
from lingua.checkpointing.dcp import CONFIG_NAME, check_fits
from lingua.checkpointing.weights import (
    CONSOLIDATE_NAME,
    SAFETENSORS_NAME,
    read_weights,
    write_weights,
)
from lingua.errors import UserError, run_cli
from lingua.tokenizer import CONFIG_NAME as TOKENIZER_CONFIG_NAME
from lingua.tokenizer import (
    SPECIALS_NAME,
    TOKENIZERS,
    HuggingFaceTokenizer,
    TokenizerArgs,
    build_tokenizer,
    find_tokenizer_file,
    read_added_tokens,
)

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
        tokenizer = find_tokenizer(args)
        copy_tokenizer(folder, tokenizer)
        fit_tokenizer(folder, args, tokenizer.name, model_args.vocab_size)
        weights = from_llama(read_folder(source), model_args, f"hf={args.hf}")
        model = build_on_meta(model_args)
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        check_fits(f"hf={args.hf}", model.state_dict(), shapes, may_leave_out=False)
        data = {"add_bos": adds_bos(tokenizer), "tokenizer": asdict(tokenizer)}
        write_json(folder / CONFIG_NAME, {"model": asdict(model_args), "data": data})
        write_weights(folder / CONSOLIDATE_NAME, weights, metadata={})


def find_tokenizer(args: ImportArgs) -> TokenizerArgs:
    """Return the tokenizer with an absolute path. UserError if it cannot be built."""
    tokenizer = args.tokenizer
    if tokenizer.path is None and TOKENIZERS[tokenizer.name][1] is not None:
        tokenizer = replace(tokenizer, path=args.hf)
    if tokenizer.path is not None:
        tokenizer = replace(tokenizer, path=str(Path(tokenizer.path).resolve()))
    try:
        build_tokenizer(tokenizer.name, tokenizer.path)
    except UserError as error:
        raise UserError(str(error).replace("data.tokenizer.", "tokenizer.")) from None
    return tokenizer


def adds_bos(args: TokenizerArgs) -> bool:
    """Return whether transformers starts a text with BOS, so that the model expects it."""
    tokenizer = build_tokenizer(args.name, args.path)
    file = find_tokenizer_file(args.name, args.path)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.bos_id >= 0
    theirs = type(tokenizer.model).from_file(str(file))  # ours has no post-processor
    return theirs.encode("a").ids[:1] == [tokenizer.bos_id]


def fit_tokenizer(folder: Path, args: ImportArgs, name: str, n_rows: int) -> None:
    """Remove tokens without a row from the tokenizer in `folder`, and print them.

    UserError if the tokenizer is another model's: more than its added tokens lack a row.
    """
    tokenizer = build_tokenizer(name, str(folder))
    n_words = tokenizer.n_words
    if n_words > n_rows and isinstance(tokenizer, HuggingFaceTokenizer):
        dropped = drop_added_tokens(folder, tokenizer, n_rows)
        n_words = build_tokenizer(name, str(folder)).n_words
        if n_words <= n_rows:
            shown = ", ".join(f"{token} ({i})" for token, i in list(dropped.items())[:5])
            more = f" and {len(dropped) - 5} more" if len(dropped) > 5 else ""
            print(
                f"{shown}{more}: beyond the model's {n_rows} rows, cannot be used; dropped from "
                "the tokenizer"
            )
    if n_words > n_rows:
        raise UserError(
            f"tokenizer.name={name} has {n_words} tokens, more than the vocabulary of "
            f"hf={args.hf}, {n_rows}; give the model's tokenizer"
        )


def drop_added_tokens(folder: Path, tokenizer: HuggingFaceTokenizer, n_rows: int) -> dict[str, int]:
    """Remove the added tokens from id `n_rows` on from the files in `folder`. Return their ids."""
    file = folder / "tokenizer.json"
    added = read_added_tokens(file)
    added |= {t.content: i for i, t in tokenizer.model.get_added_tokens_decoder().items()}
    dropped = {token: i for token, i in added.items() if i >= n_rows}
    content = read_json(file)
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in dropped]
    vocab = content["model"]["vocab"]
    if isinstance(vocab, dict):
        content["model"]["vocab"] = {t: i for t, i in vocab.items() if t not in dropped}
    if any(json.dumps(token) in json.dumps(content.get("post_processor")) for token in dropped):
        content["post_processor"] = None  # it would add them to every text
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    for name in (TOKENIZER_CONFIG_NAME, SPECIALS_NAME):
        if (folder / name).is_file():
            config = read_json(folder / name)
            nulls = dict.fromkeys(config)  # null declares a token as missing
            write_json(folder / name, nulls | _without(config, dropped))
    return dropped


def _without(value: Any, dropped: Collection[str]) -> Any:
    """Remove the tokens in `dropped`, as texts or objects, from all lists and objects."""

    def is_kept(item: Any) -> bool:
        text = item.get("content") if isinstance(item, dict) else item
        return not (isinstance(text, str) and text in dropped)

    if isinstance(value, list):
        return [_without(item, dropped) for item in value if is_kept(item)]
    if isinstance(value, dict):
        return {key: _without(item, dropped) for key, item in value.items() if is_kept(item)}
    return value


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
