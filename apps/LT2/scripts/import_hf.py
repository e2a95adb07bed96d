"""Import a Hugging Face folder for generate, eval and train: Llama, Qwen2, Qwen3, or our export.

    python -m apps.LT2.scripts.import_hf hf=Llama-folder out=llama
    python -m apps.LT2.generate ckpt=llama

Read config.json, model.safetensors (or its shards) and tokenizer.json. Write consolidated.pth with
tensors of the same dtype, params.json and the tokenizer. Added tokens without a row in the
embedding, such as a <pad>, are dropped.

Start a looped model from some of the layers. Its residual gates are zero, so with one loop it is
the stack of these layers:

    python -m apps.LT2.scripts.import_hf hf=Llama-folder out=looped loop_count=4 "layers=[0, 1, 10]"
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.LT2.flops import count_parameters
from apps.LT2.huggingface.config import args_of
from apps.LT2.huggingface.export import to_hf_name
from apps.LT2.scripts.llama import check_names, from_llama, read_llama_config
from apps.LT2.scripts.weight_folder import copy_tokenizer, new_folder, write_json
from apps.LT2.transformer import LoopedTransformerArgs, build_on_meta, fit_loop_gates
from lingua.args import dataclass_from_dict, parse_args
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
    with_sha256,
)

INDEX_NAME = f"{SAFETENSORS_NAME}.index.json"
SUFFIX = Path(SAFETENSORS_NAME).suffix


@dataclass(kw_only=True)
class ImportArgs:
    hf: str  # folder with config.json, model.safetensors and tokenizer.json
    out: str  # new folder
    loop_count: int | None = None  # how often the stack of a new looped model runs
    n_layers: int | None = None  # layers to keep, evenly spaced, first and last included; null: all
    layers: list[int] | None = None  # layers to keep, counted from 0, in this order
    # tokenizer of the model; a null path means the file in the folder hf
    tokenizer: TokenizerArgs = field(default_factory=lambda: TokenizerArgs(name="hf"))


def import_folder(args: ImportArgs) -> None:
    with new_folder(args.out) as folder:
        source, where = Path(args.hf), f"hf={args.hf}"
        if not source.is_dir():
            raise UserError(
                f"{where}: no such folder; download a model of the Hub first, e.g. with hf "
                "download meta-llama/Llama-3.2-1B --local-dir FOLDER"
            )
        config = read_json(source / "config.json")
        is_ours = config.get("model_type") == "lt2"
        read_config = read_own_config if is_ours else read_llama_config
        model_args = read_config(config, f"{where}: config.json")
        kept = layers_to_keep(args, model_args.n_layers, is_ours)
        tokenizer = find_tokenizer(args)
        copy_tokenizer(folder, tokenizer)
        fit_tokenizer(folder, args, tokenizer.name, model_args.vocab_size)
        weights = (from_own if is_ours else from_llama)(read_folder(source), model_args, where)
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        check_fits(where, build_on_meta(model_args).state_dict(), shapes, may_leave_out=False)
        if kept is not None:
            model_args, weights = make_looped(model_args, weights, args.loop_count or 1, kept)
        data = {
            "add_bos": adds_bos(tokenizer),
            "tokenizer": asdict(tokenizer_in(folder, args.out, tokenizer.name)),
        }
        write_json(folder / CONFIG_NAME, {"model": asdict(model_args), "data": data})
        write_weights(folder / CONSOLIDATE_NAME, weights, metadata={})


def read_own_config(config: Mapping[str, Any], where: str) -> LoopedTransformerArgs:
    """Read the model options of a folder that export_weights wrote, or save_pretrained after it."""
    try:
        return dataclass_from_dict(LoopedTransformerArgs, asdict(args_of(config)))
    except KeyError as error:
        raise UserError(f"{where} has no {error}; export the run again") from None
    except (UserError, TypeError) as error:
        message = str(error).removeprefix("config.json: ")
        raise UserError(f"{where}: {message}") from None


def from_own(
    weights: Mapping[str, Tensor], args: LoopedTransformerArgs, where: str
) -> dict[str, Tensor]:
    """Rename to our weights. UserError, prefixed by `where`, if a tensor is missing or unknown."""
    wanted = build_on_meta(args).state_dict()
    check_names(weights, map(to_hf_name, wanted), where, tied=args.weight_tying)
    ours = {name: weights[to_hf_name(name)] for name in wanted}
    if "rho" in ours:  # its folder may have got another loop_count since training
        ours["rho"] = fit_loop_gates(ours["rho"], args.loop_count)
    return ours


def layers_to_keep(args: ImportArgs, n_layers: int, is_ours: bool) -> list[int] | None:
    """Return which of `n_layers` layers of the folder make the new model; None: an equal model."""
    kept, n_kept = args.layers, args.n_layers
    if args.loop_count is kept is n_kept is None:
        return None
    if is_ours:
        raise UserError(
            f"loop_count, n_layers and layers need a Llama, Qwen2 or Qwen3, and hf={args.hf} is a "
            "model of LT2; import it without them and change model.loop_count in the run"
        )
    if args.loop_count is not None and args.loop_count < 1:
        raise UserError(f"loop_count={args.loop_count} must be at least 1")
    if kept is None:
        n_kept = n_layers if n_kept is None else n_kept
        if not 1 <= n_kept <= n_layers:
            raise UserError(f"n_layers={n_kept} must be from 1 to {n_layers}, the layers of hf")
        return [round(i * (n_layers - 1) / max(n_kept - 1, 1)) for i in range(n_kept)]
    if not kept or not all(0 <= layer < n_layers for layer in kept):
        raise UserError(f"layers={kept} must be layers of hf, from 0 to {n_layers - 1}")
    if n_kept not in (None, len(kept)):
        raise UserError(f"n_layers={n_kept} contradicts layers={kept}; leave one of them out")
    return kept


def make_looped(
    source: LoopedTransformerArgs, weights: Mapping[str, Tensor], loop_count: int, kept: list[int]
) -> tuple[LoopedTransformerArgs, dict[str, Tensor]]:
    """Return a model of the layers `kept` with zeros as residual gates, and print what it is."""
    args = replace(source, n_layers=len(kept), loop_count=loop_count, use_residual=loop_count > 1)
    chosen = {name: w for name, w in weights.items() if not name.startswith("layers.")}
    for i, layer in enumerate(kept):
        prefix = f"layers.{layer}."
        chosen |= {
            f"layers.{i}.{name.removeprefix(prefix)}": w
            for name, w in weights.items()
            if name.startswith(prefix)
        }
    pairs = ", ".join(f"{i} <- {layer}" for i, layer in enumerate(kept))
    print(f"layers of the new model <- layers of hf (0 to {source.n_layers - 1}): {pairs}")
    if args.use_residual:
        chosen["rho"] = torch.zeros(loop_count, args.dim)
    model = build_on_meta(args)
    counts = [count_parameters(m).total for m in (model, build_on_meta(source))]
    print(
        f"{len(kept)} layers x {loop_count} loops = depth {len(kept) * loop_count}; "
        f"{counts[0]:,} parameters (hf: {counts[1]:,})"
    )
    if args.use_residual:
        print(
            f"new: rho {tuple(chosen['rho'].shape)}, the gates of model.use_residual, is zero, so "
            "model.loop_count=1 computes the kept layers once"
        )
    return args, chosen


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


def tokenizer_in(folder: Path, out: str, name: str) -> TokenizerArgs:
    """Return the options of the tokenizer in `folder`, which becomes `out`."""
    file_name = TOKENIZERS[name][1]
    if file_name is None:
        return TokenizerArgs(name=name)
    tokenizer = with_sha256(TokenizerArgs(name=name, path=str(folder / file_name)))
    return replace(tokenizer, path=str(Path(out).resolve() / file_name))


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
        pickles = sorted(f.name for f in folder.glob("*") if f.suffix in (".bin", ".pt", ".pth"))
        only = f", and pickles such as {pickles[0]} are not loaded" if pickles else ""
        raise UserError(
            f"hf={folder} has no {SAFETENSORS_NAME} and no {INDEX_NAME}{only}; make one with "
            "transformers' save_pretrained"
        )
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
    weights: dict[str, Tensor] = {}
    for name in sorted(shards, key=str):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(SUFFIX):
            raise UserError(
                f"hf={folder}: {INDEX_NAME} names {name}, not a {SUFFIX} file beside it"
            )
        if not (folder / name).is_file():
            raise UserError(f"hf={folder}: {name}, a part of the weights, is missing; download it")
        weights |= read_weights(folder / name, "hf")
    return weights


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"hf={file.parent}: {file.name} is not readable: {error}") from None


def main(argv: list[str]) -> None:
    args = parse_args(ImportArgs, argv, prog="python -m apps.LT2.scripts.import_hf", doc=__doc__)
    import_folder(args)
    print(f"wrote {args.out}; its weights and model options start a run with:")
    print(
        f"python -m apps.LT2.train config={args.out}/{CONFIG_NAME} "
        f"checkpoint.init_ckpt_path={args.out} dump_dir=RUN data.root_dir=DATA data.seq_len=LENGTH"
    )


if __name__ == "__main__":
    run_cli(main)
