"""Convert between one loop of full attention and transformers' LlamaForCausalLM.

Its rotary embedding rotates the channels (i, i + K / 2) of a head, ours (2i, 2i + 1). So the rows
of the query and key projections are permuted. All other tensors only change their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apps.LT2.transformer import LoopedTransformerArgs
from lingua.args import dataclass_from_dict
from lingua.errors import UserError
from lingua.tokenizer import Tokenizer
from lingua.transformer import resolve_heads

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


def check_is_llama(args: LoopedTransformerArgs, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError if the model has a part that LlamaForCausalLM lacks."""
    families = {spec.mixer for loop in args.layout() for spec in loop}
    if args.loop_count != 1:
        problem = f"model.loop_count={args.loop_count}, but a Llama has one loop"
    elif families != {"full"}:
        problem = f"its mixers are {', '.join(sorted(families))}, but a Llama only has full"
    elif args.gated_attn:
        problem = "model.gated_attn=true, but a Llama has no output gate"
    elif "rho" in weights and bool(weights["rho"].any()):
        problem = "its residual gate rho (model.use_residual) is not zero, but a Llama has none"
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
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": weights["layers.0.feed_forward.w1.weight"].shape[0],
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        # transformers 5 reads the second, earlier versions the first
        "rope_theta": args.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        "max_position_embeddings": args.max_seqlen,
        "tie_word_embeddings": args.weight_tying,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
        "eos_token_id": tokenizer.eos_id if tokenizer.eos_id >= 0 else None,
        "dtype": str(dtype).removeprefix("torch."),
    }


def read_llama_config(config: Mapping[str, Any], where: str) -> LoopedTransformerArgs:
    """Read the model options of a config.json. UserError, prefixed by `where`, if unsupported."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    wanted = {  # option: (its value, supported values)
        "model_type": (config.get("model_type"), ("llama",)),
        "hidden_act": (config.get("hidden_act", "silu"), ("silu", "swish")),
        "attention_bias": (config.get("attention_bias", False), (False,)),
        "mlp_bias": (config.get("mlp_bias", False), (False,)),
        "rope_scaling (rope_type)": (kind, ("default",)),
        "partial_rotary_factor": (
            rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)),
            (1.0,),
        ),
        "quantization_config": (config.get("quantization_config"), (None,)),
    }
    for option, (value, known) in wanted.items():
        if value not in known:
            choices = " or ".join(map(str, known))
            raise UserError(f"{where}: {option}={value} is not supported, only {choices}")
    dim, n_heads = _size(config, "hidden_size", where), _size(config, "num_attention_heads", where)
    hidden_dim = _size(config, "intermediate_size", where)
    options = {
        "dim": dim,
        "n_layers": _size(config, "num_hidden_layers", where),
        "n_heads": n_heads,
        "n_kv_heads": config.get("num_key_value_heads") or n_heads,
        "head_dim": config.get("head_dim") or dim // n_heads,
        "vocab_size": _size(config, "vocab_size", where),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": config.get("rope_theta") or rope.get("rope_theta") or 10000.0,
        "max_seqlen": config.get("max_position_embeddings", 2048),
        "weight_tying": config.get("tie_word_embeddings", False),
        "use_residual": False,
        "multiple_of": 1,
        # Add 0.5, because FeedForward rounds the product down.
        "ffn_dim_multiplier": (hidden_dim + 0.5) / int(2 * (4 * dim) / 3),
    }
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
    """Rename and permute to our weights. UserError, prefixed by `where`, if a tensor is missing."""
    heads, names = _rotated(args), _names(args)
    missing = sorted(set(names.values()) - weights.keys())
    if missing:
        raise UserError(f"{where}: {len(missing)} tensors are missing, such as {missing[0]}")
    # Old versions saved the rotary frequencies. A tied head repeats the embedding.
    extra = {
        n for n in weights.keys() - set(names.values()) if not n.endswith("rotary_emb.inv_freq")
    }
    if args.weight_tying:
        extra.discard("lm_head.weight")
    if extra:
        raise UserError(f"{where}: {len(extra)} tensors are unknown, such as {min(extra)}")
    ours = {}
    for name, their_name in names.items():
        weight = weights[their_name]
        n_heads = heads.get(name.partition(".attention.")[2])
        ours[name] = weight if n_heads is None else _pairs(weight, n_heads)
    return ours


def _names(args: LoopedTransformerArgs) -> dict[str, str]:
    """Map our tensor names to theirs."""
    names = {f"{a}.weight": f"{b}.weight" for a, b in NAMES.items()}
    if args.weight_tying:
        del names["output.weight"]
    for i in range(args.n_layers):
        for a, b in LAYER_NAMES.items():
            names[f"layers.{i}.{a}.weight"] = f"model.layers.{i}.{b}.weight"
    return names


def _rotated(args: LoopedTransformerArgs) -> dict[str, int]:
    """Map the projections whose rows are permuted to their number of heads."""
    n_heads, n_kv_heads, _ = resolve_heads(args)
    return {"wq.weight": n_heads, "wk.weight": n_kv_heads}


def _halves(weight: Tensor, n_heads: int) -> Tensor:
    """Permute the rows of each head: first all even, then all odd ones."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _pairs(weight: Tensor, n_heads: int) -> Tensor:
    """Invert `_halves`."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
