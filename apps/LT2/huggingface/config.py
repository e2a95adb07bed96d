"""config.json of an exported folder: the model's options, and what other programs read."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from apps.LT2.transformer import LoopedTransformerArgs
from lingua.errors import UserError
from lingua.transformer import query_heads

# Options that transformers or its users change, by their names in config.json.
SHARED = {
    "vocab_size": "vocab_size",
    "loop_count": "loop_count",
    "tie_word_embeddings": "weight_tying",
}
# Kernels depend on the machine, not on the weights.
LEFT_OUT = ("attn_impl",)


def options_of(args: LoopedTransformerArgs) -> dict[str, Any]:
    """Return the entries of config.json that `args_of` reads."""
    model = asdict(args)
    for name in LEFT_OUT:
        del model[name]
    return {theirs: model.pop(ours) for theirs, ours in SHARED.items()} | {"model": model}


def args_of(config: Mapping[str, Any]) -> LoopedTransformerArgs:
    """Read the model options of a config.json. UserError for an unknown option."""
    options = dict(config["model"])
    known = get_type_hints(LoopedTransformerArgs)
    _check_names("model", options, known)
    for name, value in options.items():
        kinds = (known[name], *get_args(known[name]))
        section = next((kind for kind in kinds if is_dataclass(kind)), None)
        if isinstance(section, type) and value is not None:
            _check_names(f"model.{name}", value, {field.name for field in fields(section)})
            options[name] = section(**value)
    shared = {ours: config[theirs] for theirs, ours in SHARED.items()}
    return LoopedTransformerArgs(**options, **shared)


def _check_names(section: str, options: Iterable[str], known: Container[str]) -> None:
    for name in options:
        if name not in known:
            raise UserError(
                f"config.json: {section}.{name} is not an option of this version of LT2; "
                "use the version that wrote the folder, or a newer one"
            )


def derived_entries(args: LoopedTransformerArgs) -> dict[str, Any]:
    """Return the entries of config.json for readers; loading computes them again.

    layout is what each layer runs, by loop.
    """
    return {
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": query_heads(args),
        "max_position_embeddings": args.max_seqlen,
        "layout": [[str(spec) for spec in loop] for loop in args.layout()],
    }
