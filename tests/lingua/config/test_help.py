"""--help shows types, defaults and the comments of the source."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lingua.args import parse_args
from lingua.config.help import describe_fields
from lingua.errors import UserError
from tests.lingua.some_args import Args


def test_describe_fields_reads_comments():
    docs = {doc.path: doc for doc in describe_fields(Args)}
    assert docs["name"].meaning == "What the run is called"
    assert docs["steps"].meaning == "optimizer steps"
    assert docs["fused"].meaning == ""
    assert docs["dump.every"].meaning == "steps between two"
    assert docs["dump.every"].default == "50"
    assert docs["eval"].type == "section or null" and docs["eval"].default == "null"
    assert docs["eval.limit"].type == "int or null"
    assert docs["data.sources"].type == "dict[str, float]"
    assert docs["optim.clip"].type == "float or null"
    assert "data" not in docs


def test_help_prints_every_field_and_the_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(Args, ["--help"], prog="run me", doc="Does it.\n\n    run me a=b\n\nMore.\n")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for doc in describe_fields(Args):
        assert doc.path in text and doc.meaning in text
    assert "Does it.\n\n    run me a=b\n\n" in text and "More." not in text
    assert "where text comes from" in text


def test_help_works_with_a_closed_pipe():
    code = (
        "import dataclasses; from lingua.args import parse_args\n"
        "parse_args(dataclasses.make_dataclass('A', [('x' * 200_000, int, 1)]), ['-h'])\n"
    )
    command = f'"{sys.executable}" -c "{code}" | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage:") and done.stderr == ""


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from lingua.args import parse_args; import dataclasses\n"
        "A = dataclasses.make_dataclass('A', [('x', int, 1)])\n"
        "try: parse_args(A, ['-h'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'omegaconf', 'yaml'} & set(sys.modules), 'heavy'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_of_sections_and_options(capsys):
    for argv, want in (
        (["--help", "optim"], ["optim"]),
        (["-h", "config=run.yaml", "dump", "data.sources"], ["dump", "data.sources"]),
    ):
        with pytest.raises(SystemExit):
            parse_args(Args, argv)
        lines = capsys.readouterr().out.splitlines()
        shown = {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "}
        docs = {doc.path for doc in describe_fields(Args)}
        assert shown == {
            path for path in docs if f"{path}.".startswith(tuple(f"{w}." for w in want))
        }


@pytest.mark.parametrize("name, message", [("optin", "did you mean optim"), ("x", "run --help")])
def test_help_of_an_unknown_section(name, message):
    with pytest.raises(UserError, match=f"--help {name}: .*{message}"):
        parse_args(Args, ["--help", name], prog="run")
