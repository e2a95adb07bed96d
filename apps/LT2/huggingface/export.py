"""Write a folder that transformers loads with `trust_remote_code=True`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.LT2.huggingface.bundle import bundle
from apps.LT2.huggingface.config import derived_entries, options_of
from apps.LT2.scripts.weight_folder import write_json
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.checkpointing.weights import write_weights
from lingua.files.atomic import write_atomic

MODELING = "modeling_lt2"
MAX_SHARD = 5 * 10**9  # bytes of a weight file
CLASSES = {
    "AutoConfig": "LT2Config",
    "AutoModel": "LT2Model",
    "AutoModelForCausalLM": "LT2ForCausalLM",
}


def write_model(
    folder: Path,
    args: LoopedTransformerArgs,
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    tokens: Mapping[str, int | list[int]],
) -> None:
    """Write config.json, the modelling file and the weights.

    weights   by our names; dtype is the weight matrices'
    tokens    ids of special tokens, such as {"eos_token_id": 2}
    """
    config = {
        "model_type": "lt2",
        "architectures": ["LT2ForCausalLM"],
        "auto_map": {auto: f"{MODELING}.{name}" for auto, name in CLASSES.items()},
        "dtype": str(dtype).removeprefix("torch."),
        **options_of(args),
        "loop_gates": args.loop_count,
        **derived_entries(args),
        **tokens,
    }
    write_json(folder / "config.json", config)
    write_atomic(folder / f"{MODELING}.py", bundle())
    write_shards(folder, {to_hf_name(name): weight for name, weight in weights.items()})


def to_hf_name(name: str) -> str:
    """Return a weight's name in the folder."""
    return "lm_head.weight" if name == "output.weight" else f"model.{name}"


def from_hf_name(name: str) -> str:
    """Return our name of a weight of the folder."""
    return "output.weight" if name == "lm_head.weight" else name.removeprefix("model.")


def write_shards(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write model.safetensors, or files of at most MAX_SHARD bytes with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    room = MAX_SHARD
    for name, weight in weights.items():
        if weight.nbytes > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD
        shards[-1][name] = weight
        room -= weight.nbytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(weight.nbytes for weight in weights.values())},
            "weight_map": {
                name: file for file, shard in zip(files, shards, strict=True) for name in shard
            },
        }
        write_json(folder / "model.safetensors.index.json", index)
    for file, shard in zip(files, shards, strict=True):
        write_weights(folder / file, shard, metadata={"format": "pt"})
