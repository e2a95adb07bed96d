"""Write a summary of each recipe to tests/golden/<scale>/<recipe>.json, for review.

    python -m tests.LT2.golden --write      rewrites them; then review `git diff tests/golden`

Everything but the weights comes from `apps.LT2.describe`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch

import apps.LT2.describe
from apps.LT2.training.args import TrainArgs
from apps.LT2.transformer import LoopedTransformer
from lingua.args import parse_args
from lingua.optim import build_param_groups

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "apps/LT2/configs"
GOLDEN = ROOT / "tests/golden"
RECIPES = sorted(set(CONFIGS.glob("[0-9]*/*.yaml")) - set(CONFIGS.glob("*/eval.yaml")))
# Vocabulary sizes of the recipes' tokenizers: Llama 3's, and setup/prepare_local_data.py's.
VOCABULARIES = {"tiktoken": 128_256, "hf": 2_048}


@cache
def read_recipe(recipe: Path) -> TrainArgs:
    """Read a recipe and fill in its vocabulary size, as the trainer does from the tokenizer."""
    args = parse_args(TrainArgs, [f"config={recipe}"])
    args.model.vocab_size = VOCABULARIES[args.data.tokenizer.name]
    return args


@cache
def build(recipe: Path) -> LoopedTransformer:
    with torch.device("meta"):
        return LoopedTransformer(read_recipe(recipe).model)


def golden_file(recipe: Path) -> Path:
    return (GOLDEN / recipe.relative_to(CONFIGS)).with_suffix(".json")


def describe(recipe: Path) -> dict[str, Any]:
    """Return what `apps.LT2.describe ngpu=8` shows, and the weights."""
    args = read_recipe(recipe)
    described = apps.LT2.describe.describe(args, ngpu=8, bandwidth=3.35)
    del described["decode"]  # speeds, not sizes
    return described | describe_weights(build(recipe))


def describe_weights(model: LoopedTransformer) -> dict[str, dict[str, str]]:
    """Group parameters by weight decay: name, number of layers, shape."""
    weights: dict[str, dict[str, str]] = {}
    decays = {
        param: f"weight decay {group['weight_decay']}"
        for group in build_param_groups(model, weight_decay=0.1)
        for param in group["params"]
    }
    counts: Counter[tuple[str, str, str]] = Counter()
    for name, param in model.named_parameters():
        shape = " x ".join(map(str, param.shape))
        counts[decays[param], re.sub(r"layers\.\d+\.", "layers.*.", name), shape] += 1
    for (decay, name, shape), n in counts.items():
        shown = weights.setdefault(decay, {})
        assert name not in shown, f"{name} has different shapes in different layers"
        shown[name] = f"{n} of {shape}" if "*" in name else shape
    return weights


def as_text(description: dict[str, Any]) -> str:
    return json.dumps(description, indent=2, ensure_ascii=False) + "\n"


def write_all() -> None:
    for stale in set(GOLDEN.glob("*/*.json")) - set(map(golden_file, RECIPES)):
        stale.unlink()
    for recipe in RECIPES:
        file = golden_file(recipe)
        file.parent.mkdir(exist_ok=True)
        file.write_text(as_text(describe(recipe)), encoding="utf-8")
        print(file.relative_to(ROOT))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the golden files of all recipes.")
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    write_all()
