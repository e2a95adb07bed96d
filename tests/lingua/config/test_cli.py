"""Command lines that mix --options and key=value overrides."""

from __future__ import annotations

import pytest

from lingua.config.cli import OneLineParser, config_names
from lingua.errors import UserError
from tests.readme import ROOT


def parse(*argv: str) -> tuple[list[str], str | None, list[str]]:
    parser = OneLineParser()
    parser.add_argument("--config", nargs="+", default=[])
    parser.add_argument("--plot")
    parser.add_argument("--quiet", action="store_true")
    given, overrides = parser.parse_with_overrides(argv)
    return given.config, given.plot, overrides


def test_overrides_are_found_in_any_position():
    argv = ("a.b=1", "--config", "x.yaml", "y.yaml", "data.sources[c-1.0]=2", "--quiet", "d=e=f")
    assert parse(*argv) == (
        ["x.yaml", "y.yaml"],
        None,
        ["a.b=1", "data.sources[c-1.0]=2", "d=e=f"],
    )


@pytest.mark.parametrize(
    "paths, names",
    [
        (["a/x.yaml", "b/y.yaml"], ["x", "y"]),
        (["a/x.yaml", "b/x.yaml"], ["a/x.yaml", "b/x.yaml"]),
        (["x.yaml", "y.yaml", "x.yaml", "x.yaml"], ["x", "y", "x (2)", "x (3)"]),
    ],
)
def test_every_config_has_a_name(paths, names):
    assert config_names(paths) == names


def test_a_path_with_an_equals_sign_is_not_an_override():
    run = "runs/tune/lr=0.0001,loop_count=4/config.yaml"  # a sweep names its run folders so
    assert parse("--config", "x.yaml", run, "a=1") == (["x.yaml", run], None, ["a=1"])
    assert parse("--config", "lr=1/config.yaml", "--plot", "lr=1.png") == (
        ["lr=1/config.yaml"],
        "lr=1.png",
        [],
    )


@pytest.mark.parametrize("argv", [("--nonsense",), ("--plot",), ("word",)])
def test_errors_are_one_line(argv):
    with pytest.raises(UserError, match="--help lists all options"):
        parse(*argv)


def test_help_shows_defaults(capsys):
    parser = OneLineParser()
    parser.add_argument("--steps", type=int, default=20, help="to run")
    parser.add_argument("--lengths", nargs="+", default=[8, 9], help="of prompts")
    parser.add_argument("--name", help="of the run")
    parser.add_argument("--vary", action="append", default=[], help="one run each")
    parser.add_argument("--quiet", action="store_true", help="say nothing")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "to run (default: 20) --lengths" in text and "of prompts (default: 8 9) --name" in text
    assert text.count("default") == 2


def test_every_program_shows_its_defaults():
    """Every program uses OneLineParser, or a dataclass and parse_args."""
    folders = [ROOT / name for name in ("apps", "lingua", "setup")]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert [file.name for file in files if "ArgumentParser(" in file.read_text()] == []
