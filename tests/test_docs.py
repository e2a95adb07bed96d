"""README, docs, configs and code agree: what the documents name exists."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import pytest

from apps.LT2.__main__ import COMMANDS
from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.generate import GenerateArgs
from apps.LT2.mixers import MIXERS
from apps.LT2.scripts.export_weights import ExportArgs
from apps.LT2.scripts.import_hf import ImportArgs
from apps.LT2.scripts.push_to_hub import PushArgs
from apps.LT2.training.args import TrainArgs
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.args import parse_args
from lingua.config.help import describe_fields
from lingua.config.ignored import IGNORED
from lingua.stool import StoolArgs
from lingua.sweep import TableArgs
from tests.readme import GUIDES, README, ROOT, SECTIONS, commands

CONFIGS = ROOT / "apps/LT2/configs"
EVALUATIONS = sorted(CONFIGS.glob("*/eval.yaml"))
RECIPES = sorted(set(CONFIGS.glob("[0-9]*/*.yaml")) - set(EVALUATIONS))
PROGRAMS = {
    "apps.LT2.train": TrainArgs,
    "apps.LT2.eval": EvalArgs,
    "apps.LT2.generate": GenerateArgs,
    "apps.LT2.scripts.export_weights": ExportArgs,
    "apps.LT2.scripts.import_hf": ImportArgs,
    "apps.LT2.scripts.push_to_hub": PushArgs,
    "lingua.stool": StoolArgs,
    "lingua.sweep": TableArgs,
}


MODEL_FIELDS = SECTIONS["docs/configuration.md: Fields of `model:`"]
SECTION = "distributed|logging|data|profiling|checkpoint|model|optim|eval"
OPTION = rf"`((?:{SECTION})\.(?!safetensors)[a-z_.]+)"


def names_of(options: Iterable[str]) -> set[str]:
    names = {option.partition("=")[0] for option in options}
    return {"sweep" if name.startswith("sweep.") else name for name in names}


def fields_of(cls: type) -> set[str]:
    return {doc.path for doc in describe_fields(cls)} | {*getattr(cls, "ALIASES", ())}


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.text)
def test_commands_name_what_exists(command):
    words = command.words
    if words[0] == "torchrun":
        words = words[words.index("-m") - 1 :]
    if "-m" in words and words[words.index("-m") + 1] in PROGRAMS:
        at = words.index("-m") + 1
        end = words.index("--") if "--" in words else len(words)
        options = [w for w in words[at + 1 : end] if "=" in w and not w.startswith("-")]
        known = fields_of(PROGRAMS[words[at]]) | {"config"}
        if "--help" in words:
            known |= {path.rpartition(".")[0] for path in known}
        assert names_of(options) <= known
        assert names_of(words[end + 1 :]) <= fields_of(TrainArgs)  # stool passes them on
        swept = {w.removeprefix("sweep.") for w in options if w.startswith("sweep.")}
        assert names_of(swept) <= fields_of(TrainArgs)
        for value in (w.partition("=")[2] for w in options if w.startswith("config=")):
            assert value.startswith("runs/") or (ROOT / value).is_file()
    for word in words:
        if word.startswith(("setup/", "requirements")):
            assert (ROOT / word).is_file()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_links_lead_to_files(guide):
    targets = re.findall(r"\]\(([^)#:]+)\)", guide.read_text(encoding="utf-8"))
    assert [target for target in targets if not (guide.parent / target).exists()] == []


def expand_braces(text: str) -> list[str]:
    """`a_{b,c}` -> a_b, a_c, as a shell does."""
    parts = re.split(r"\{([^}]*)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def test_the_table_of_recipes_names_every_file_once():
    rows = re.findall(r"^\| `([^`]+)` \|", SECTIONS["Recipes"], re.M)
    names = [name for row in rows for name in expand_braces(row)]
    scaled = [name.replace("*", scale) for name in names for scale in ("600M", "1B")]
    expected = sorted(str(path.relative_to(CONFIGS)) for path in RECIPES)
    assert sorted({*scaled}) == expected and len(names) == len({*names})


def test_the_table_of_mixers_names_every_mixer_once():
    (row,) = re.findall(r"^\| `mixer` \|(.*)\|$", MODEL_FIELDS, re.M)
    assert sorted(re.findall(r"`(\w+)`", row)) == sorted(MIXERS)
    (listed,) = re.findall(r"^`mixer` is one of (.*?)\(", README, re.M | re.S)
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(MIXERS)
    for table in re.findall(r"^\| mixer \|.*?\n\n", SECTIONS["docs/mixers.md: start"], re.M | re.S):
        cells = re.findall(r"^\|([^|]*)\|", table, re.M)[2:]
        assert sorted(re.findall(r"`(\w+)`", "".join(cells))) == sorted(MIXERS)


def test_the_table_of_commands_is_complete():
    rows = re.findall(
        r"^\| `([a-z ]+)` \| `(.*)` \|$", SECTIONS["docs/configuration.md: Commands"], re.M
    )
    assert rows == [(name, module) for name, (module, _) in COMMANDS.items()]


def test_model_table_names_fields():
    names = re.findall(r"^\| `(\w+)` \|", MODEL_FIELDS, re.M)
    assert len(names) >= 10
    assert set(names) <= set(LoopedTransformerArgs.__dataclass_fields__)


def test_options_in_the_text_exist():
    options = re.findall(OPTION, "".join(SECTIONS.values()))
    known = fields_of(TrainArgs)
    sections = {path.rpartition(".")[0] for path in known} | {"logging.wandb"}
    assert set(options) <= known | sections | IGNORED.keys()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_say_what_they_are(recipe):
    assert recipe.read_text(encoding="utf-8").startswith("# ")
    args = parse_args(TrainArgs, [f"config={recipe}"])
    args.model.layout()
    assert args.dump_dir.startswith("runs/")


@pytest.mark.parametrize("config", EVALUATIONS, ids=lambda path: path.parent.name)
def test_evaluations_load_and_say_how_to_run(config):
    assert f"config={config.relative_to(ROOT)}" in config.read_text(encoding="utf-8")
    args = parse_args(EvalArgs, [f"config={config}", "ckpt_dir=somewhere"])
    assert args.harness is not None and args.harness.tasks
    # the suites of the paper: common sense, and recall
    assert {"hellaswag", "arc_easy", "boolq", "swde", "fda", "drop"} <= set(args.harness.tasks)


def test_the_tree_of_the_code_exists():
    tree = SECTIONS["Files and code"].split("```")[3]
    modules = re.findall(r"(\w+\.py)\b", tree)
    assert [m for m in modules if m != "naive.py" and not (ROOT / "apps/LT2" / m).is_file()] == []
    folders = re.findall(r"\b([a-z]+)/(?!L)", tree)
    assert [
        f for f in folders if not ((ROOT / "apps/LT2" / f).is_dir() or (ROOT / f).is_dir())
    ] == ["benchmarks"]
