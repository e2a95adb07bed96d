"""A recipe with a mistake runs or ends in a UserError, never in a traceback or a hang.

To run means to read and check the file and to build the model on the meta device. An accepted
value must reach the options, and an accepted change of `model:` must reach the model.
LT2_FUZZ=2000 runs 2,000 cases.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.LT2.training.args import TrainArgs, validate_train_args
from apps.LT2.training.unused_options import unused_options
from apps.LT2.transformer import LoopedTransformer
from lingua.args import parse_args
from lingua.config.help import describe_fields
from lingua.config.yaml import read_yaml_file
from lingua.errors import UserError
from lingua.tokenizer import ByteTokenizer
from tests.fuzz_text import damage_text, fuzz_count, no_hang, other_value
from tests.LT2.tiny_run import write_corpus
from tests.readme import ROOT

yaml = pytest.importorskip("yaml")

COUNT = fuzz_count(60)
RECIPES = sorted(set(ROOT.glob("apps/LT2/configs/[0-9]*/*.yaml")) - set(ROOT.rglob("eval.yaml")))
OPTIONS = {doc.path: doc.default for doc in describe_fields(TrainArgs)}

# Used by weight initialization and by code around the model. Recipes without windowed layers may
# set default_sliding_window, too (see unused_options.py).
NOT_IN_THE_MODEL = {
    "seed",
    "init_base_std",
    "init_std_factor",
    "max_seqlen",
    "default_sliding_window",
    "loop_schedule",
    "loop_sample",
    "loop_bptt",
    "loop_loss",
    "loop_entropy",
    "loop_loss_every",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("fuzz"), n_chunks=1)


def recipe_text(recipe: Path, place: Path) -> str:
    """Return the recipe without comments, with five layers and with data in `place`."""
    tree = read_yaml_file(recipe)[0]
    tree["dump_dir"] = str(place / "run")
    tree["data"] |= {"root_dir": str(place), "sources": {"text": 1.0}}
    tree["data"]["tokenizer"] = {"name": "bytes"}
    tree["model"]["n_layers"] = 5
    tree["model"].pop("vocab_size", None)
    return yaml.safe_dump(tree, sort_keys=False)


def mutate(text: str, rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return damage_text(text, rng)
    if kind == 1:  # one more option
        option = rng.choice(list(OPTIONS))
        return with_option(text, option, other_value(OPTIONS[option], rng))
    lines = text.splitlines()
    i = rng.randrange(len(lines))
    name, colon, value = lines[i].partition(": ")
    if kind == 2:  # another value
        lines[i] = f"{name}{colon or ': '}{other_value(value, rng)}"
    else:  # another name
        j = rng.randrange(len(name))
        lines[i] = name[:j] + rng.choice("abcx_.-") + name[j + 1 :] + colon + value
    return "\n".join(lines) + "\n"


def with_option(text: str, option: str, value: str) -> str:
    """Add an option at the start of its section."""
    *sections, name = option.split(".")
    lines, at, depth = text.splitlines(), 0, 0
    for depth, section in enumerate(sections):
        head = "  " * depth + section + ":"
        found = next((i for i, line in enumerate(lines[at:], at) if line == head), None)
        if found is None:
            lines.insert(at, head)
            found = at
        at = found + 1
    lines.insert(at, "  " * len(sections) + f"{name}: {value}")
    return "\n".join(lines) + "\n"


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, str(key)))
    else:
        yield path, tree


def lookup(options: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if is_dataclass(options):
            options = getattr(options, key)
        elif isinstance(options, Mapping):
            options = options[key]
    return options


def is_same(given: Any, got: Any) -> bool:
    """Compare a value of the file with the option that was built from it."""
    if given is None or given == {}:
        return True  # means the default
    if isinstance(got, bool):
        return str(given).lower() in (
            ("true", "yes", "on", "1") if got else ("false", "no", "off", "0")
        )
    if isinstance(got, int | float):
        return float(given) == float(got)
    if isinstance(got, list | tuple):
        return len(given) == len(got) and all(map(is_same, given, got))
    return str(given) == str(getattr(got, "value", got))


def facts(model: LoopedTransformer) -> dict[str, Any]:
    """Return the layout of a model, the attributes of its modules and the shapes of parameters."""
    found: dict[str, Any] = {"layout": model.layout_plan}
    for name, module in model.named_modules():
        found[f"{name} is"] = type(module).__name__
        for key, value in vars(module).items():
            if key != "args" and not key.startswith("_"):
                if is_dataclass(value) and not isinstance(value, type):
                    value = str(value)
                if isinstance(value, int | float | str | bool | None):
                    found[f"{name}.{key}"] = value
    return found | {name: tuple(p.shape) for name, p in model.named_parameters()}


def build(args: TrainArgs) -> LoopedTransformer:
    with torch.device("meta"):
        return LoopedTransformer(args.model)


def changed_fields(before: Any, after: Any) -> set[str]:
    changed = {f.name for f in fields(before) if getattr(before, f.name) != getattr(after, f.name)}
    if None in (before.n_kv_heads, after.n_kv_heads):
        changed -= {"n_kv_heads"}  # null may mean the same number
    return changed


def run_recipe(text: str, place: Path) -> tuple[TrainArgs, TrainArgs]:
    """Return the options as given and as validated; raise UserError if they are rejected."""
    file = place / "mutant.yaml"
    file.write_text(text, encoding="utf-8")
    given = parse_args(TrainArgs, [f"config={file}"])
    return given, validate_train_args(given, ByteTokenizer().n_words)


@functools.cache
def checked_recipe(text: str, place: Path) -> TrainArgs:
    return run_recipe(text, place)[1]


@pytest.mark.parametrize("block", range(10))
def test_recipes_with_mistakes(block, place):
    outcomes = {"ran": 0, "rejected": 0}
    for number in range(block, COUNT, 10):
        rng = random.Random(f"recipe {number}")
        original = recipe_text(rng.choice(RECIPES), place)
        text = mutate(original, rng)
        with no_hang(number):
            outcomes[check_case(original, text, place)] += 1
    print(outcomes)
    assert COUNT < 1000 or all(outcomes.values())


def check_case(original: str, text: str, place: Path) -> str:
    try:
        given, resolved = run_recipe(text, place)
    except UserError as error:
        assert str(error)
        return "rejected"
    tree = read_yaml_file(place / "mutant.yaml")[0]
    if "${" not in text:
        for path, value in leaves(tree):
            assert is_same(value, lookup(given, path)), f"{'.'.join(path)}: {value!r} was changed"
    base = checked_recipe(original, place)
    changed = changed_fields(base.model, resolved.model) - NOT_IN_THE_MODEL
    changed -= unused_options(resolved.model).keys()
    if changed:
        assert facts(build(base)) != facts(build(resolved)), f"{changed} changed nothing"
    return "ran"
