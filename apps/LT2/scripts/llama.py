"""Convert between one loop of full attention and transformers' Llama, Qwen2 and Qwen3.

Their rotary embedding rotates the channels (i, i + K / 2) of a head, ours (2i, 2i + 1). So the
channels of queries and keys are permuted. All other tensors only change their names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from apps.LT2.mixers.rotary import OPTIONS_OF
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.args import dataclass_from_dict
from lingua.errors import UserError
from lingua.tokenizer import Tokenizer
from lingua.transformer import resolve_heads

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",  # biases of q, k and v
    "qwen3": "Qwen3ForCausalLM",  # norms of q and k
}
NAMES = {  # ours -> theirs
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {  # below layers.<i> -> below model.layers.<i>
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
QK_NORM_NAMES = {
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
}
FULL = {"full_attention"}


def check_is_llama(args: LoopedTransformerArgs, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError if the model has a part that Llama, Qwen2 and Qwen3 lack."""
    families = {spec.mixer for loop in args.layout() for spec in loop}
    if args.loop_count != 1:
        problem = f"model.loop_count={args.loop_count}, but a Llama has one loop"
    elif families != {"full"}:
        problem = f"its mixers are {', '.join(sorted(families))}, but a Llama only has full"
    elif args.gated_attn:
        problem = "model.gated_attn=true, but a Llama has no output gate"
    elif "rho" in weights and bool(weights["rho"].any()):
        problem = "its residual gate rho (model.use_residual) is not zero, but a Llama has none"
    elif args.qk_norm and args.attn_bias == "qkv":
        problem = "model.attn_bias=qkv with model.qk_norm=true, but a Qwen3 has none or qkvo"
    else:
        return
    raise UserError(f"format=hf needs a Llama: {problem}; use format=safetensors or consolidated")


def llama_config(
    args: LoopedTransformerArgs,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return config.json for a model that passes `check_is_llama`."""
    n_heads, n_kv_heads, head_dim = resolve_heads(args)
    kind = "qwen3" if args.qk_norm else "qwen2" if args.attn_bias == "qkv" else "llama"
    scaling = {}
    if args.rope_scaling is not None:
        used = ("rope_type", "factor", *sorted(OPTIONS_OF[args.rope_scaling.rope_type]))
        values = {name: getattr(args.rope_scaling, name) for name in used}
        scaling = {name: value for name, value in values.items() if value is not None}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": weights["layers.0.feed_forward.w1.weight"].shape[0],
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        # transformers 5 reads the third, earlier versions the first two
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": args.rope_theta},
        "max_position_embeddings": args.max_seqlen,
        "tie_word_embeddings": args.weight_tying,
        "attention_bias": args.attn_bias != "none",
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
        "eos_token_id": tokenizer.eos_id if tokenizer.eos_id >= 0 else None,
        "dtype": str(dtype).removeprefix("torch."),
    }


def read_llama_config(config: Mapping[str, Any], where: str) -> LoopedTransformerArgs:
    """Read the model options of a config.json. UserError, prefixed by `where`, if unsupported."""
    kind = config.get("model_type")
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    windows = config.get("use_sliding_window") or set(config.get("layer_types") or ()) - FULL
    wanted = {  # option: (its value, supported values)
        "model_type": (kind, tuple(ARCHITECTURES)),
        "hidden_act": (config.get("hidden_act", "silu"), ("silu", "swish")),
        "mlp_bias": (config.get("mlp_bias", False), (False,)),
        "rope_scaling (rope_type)": (rope_type, ("default", *OPTIONS_OF)),
        "partial_rotary_factor": (
            rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)),
            (1.0,),
        ),
        "use_sliding_window": (bool(windows), (False,)),
        "quantization_config": (config.get("quantization_config"), (None,)),
    }
    for option, (value, known) in wanted.items():
        if value not in known:
            choices = " or ".join("null" if value is None else str(value) for value in known)
            raise UserError(f"{where}: {option}={value} is not supported, only {choices}")
    dim, n_heads = _size(config, "hidden_size", where), _size(config, "num_attention_heads", where)
    hidden_dim = _size(config, "intermediate_size", where)
    is_qwen = kind != "llama"
    max_seqlen = config.get("max_position_embeddings", 32768 if is_qwen else 2048)
    biased = "qkvo" if config.get("attention_bias") else "none"
    options = {
        "dim": dim,
        "n_layers": _size(config, "num_hidden_layers", where),
        "n_heads": n_heads,
        "n_kv_heads": config.get("num_key_value_heads", 32 if is_qwen else None) or n_heads,
        "head_dim": config.get("head_dim", 128 if kind == "qwen3" else None) or dim // n_heads,
        "vocab_size": _size(config, "vocab_size", where),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        "attn_bias": "qkv" if kind == "qwen2" else biased,
        "qk_norm": kind == "qwen3",
        "max_seqlen": max_seqlen,
        "weight_tying": config.get("tie_word_embeddings", False),
        "use_residual": False,
        "multiple_of": 1,
        # Add 0.5, because FeedForward rounds the product down.
        "ffn_dim_multiplier": (hidden_dim + 0.5) / int(2 * (4 * dim) / 3),
    }
    if rope_type != "default":
        context = config.get("original_max_position_embeddings")  # it prevails, as there
        rope["original_max_position_embeddings"] = (
            context or rope.get("original_max_position_embeddings") or max_seqlen
        )
        used = {"factor", *OPTIONS_OF[rope_type]} & rope.keys()
        scaling = {name: rope[name] for name in used if rope[name] is not None}
        options["rope_scaling"] = {"rope_type": rope_type, **scaling}
    try:
        return dataclass_from_dict(LoopedTransformerArgs, options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _size(config: Mapping[str, Any], option: str, where: str) -> int:
    value = config.get(option)
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {option}={value} must be an integer of at least 1")
    return value


def to_llama(weights: Mapping[str, Tensor], args: LoopedTransformerArgs) -> dict[str, Tensor]:
    """Rename and permute to their weights. rho, which is zero (`check_is_llama`), is dropped."""
    heads = _rotated(args)
    theirs = {}
    for ours, name in _names(args).items():
        weight = weights[ours]
        n_heads = heads.get(ours.partition(".attention.")[2])
        theirs[name] = weight if n_heads is None else _halves(weight, n_heads)
    return theirs


def from_llama(
    weights: Mapping[str, Tensor], args: LoopedTransformerArgs, where: str
) -> dict[str, Tensor]:
    """Rename and permute to our weights. UserError, prefixed by `where`, if they don't fit."""
    heads, names = _rotated(args), _names(args)
    check_names(weights, names.values(), where, tied=args.weight_tying)
    ours = {}
    for name, their_name in names.items():
        weight = weights[their_name]
        n_heads = heads.get(name.partition(".attention.")[2])
        ours[name] = weight if n_heads is None else _pairs(weight, n_heads)
    return ours


def check_names(stored: Collection[str], wanted: Iterable[str], where: str, *, tied: bool) -> None:
    """Raise UserError, prefixed by `where`, if a tensor is missing or unknown."""
    wanted = set(wanted)
    missing = sorted(wanted.difference(stored))
    if missing:
        raise UserError(
            f"{where}: tensors are missing ({len(missing)}), such as {missing[0]}; the folder is "
            "incomplete, or its config.json is another model's: download it again"
        )
    # Old versions saved the rotary frequencies. A tied head repeats the embedding.
    extra = {n for n in set(stored) - wanted if not n.endswith("rotary_emb.inv_freq")}
    if tied:
        extra.discard("lm_head.weight")
    if extra:
        raise UserError(
            f"{where}: tensors are unknown ({len(extra)}), such as {min(extra)}; a changed "
            "architecture can't be imported, and adapters must be merged into the weights first"
        )


def _names(args: LoopedTransformerArgs) -> dict[str, str]:
    """Map our tensor names to theirs."""
    names = {f"{a}.weight": f"{b}.weight" for a, b in NAMES.items()}
    if args.weight_tying:
        del names["output.weight"]
    layer = LAYER_NAMES | (QK_NORM_NAMES if args.qk_norm else {})
    tensors = {f"{a}.weight": f"{b}.weight" for a, b in layer.items()}
    for letter in args.attn_bias.removeprefix("none"):
        ours = f"attention.w{letter}"
        tensors[f"{ours}.bias"] = f"{LAYER_NAMES[ours]}.bias"
    for i in range(args.n_layers):
        names |= {f"layers.{i}.{a}": f"model.layers.{i}.{b}" for a, b in tensors.items()}
    return names


def _rotated(args: LoopedTransformerArgs) -> dict[str, int]:
    """Map the tensors whose first dimension is permuted to their number of heads."""
    n_heads, n_kv_heads, _ = resolve_heads(args)
    heads = {"wq": n_heads, "wk": n_kv_heads, "q_norm": 1, "k_norm": 1}
    return {f"{a}.{kind}": n for a, n in heads.items() for kind in ("weight", "bias")}


def _halves(weight: Tensor, n_heads: int) -> Tensor:
    """Permute the channels of each head along dimension 0: first all even, then all odd ones."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _pairs(weight: Tensor, n_heads: int) -> Tensor:
    """Invert `_halves`."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
