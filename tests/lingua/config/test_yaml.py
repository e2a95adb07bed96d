"""Scalars follow YAML 1.2, on the command line and in a file."""

from __future__ import annotations

import pytest

from lingua.config.yaml import read_yaml_file, yaml_value
from lingua.errors import UserError


@pytest.mark.parametrize(
    "text, want",
    [
        ("4:1", "4:1"),  # 241 in YAML 1.1
        ("1:30:00", "1:30:00"),
        ("4:1.5", "4:1.5"),
        ("bookend:2", "bookend:2"),
        ("2024-01-01", "2024-01-01"),
        ("010", "010"),
        ("0", 0),
        ("-12", -12),
        ("1_000", 1000),
        ("0x10", 16),
        ("1e-3", 1e-3),
        ("2.5E3", 2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("true", True),
        ("on", "on"),
        ("No", "No"),
        ("null", None),
        ("", None),
        ("[4:1, {a: 3:2}]", ["4:1", {"a": "3:2"}]),
        ("'3'", "3"),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path, text, want):
    got = yaml_value(text)
    assert got == want and type(got) is type(want)
    file = tmp_path / "run.yaml"
    file.write_text(f"a:\n  b: {text}\n")
    data, lines = read_yaml_file(file)
    assert data == {"a": {"b": want}} and type(data["a"]["b"]) is type(want)
    assert (lines["a"], lines["a.b"]) == (f"{file}:1", f"{file}:2")


@pytest.mark.parametrize(
    "text, line, why",
    [
        ("a: 1\nb: [1, 2\n", 3, "not YAML"),
        ("a: 1\nb:\n\tc: 2\n", 3, "not YAML"),
        ("steps: 1\noptim: {}\nsteps: 2\n", 3, "steps is given twice"),
        ("optim:\n  lr: 1\n  lr: 2\n", 3, "lr is given twice"),
        ("a: 1\n---\nb: 2\n", 2, "not YAML"),
        ("a: !!python/name:os.system\n", 1, "not YAML"),
        ("- a\n", 1, "expected a mapping"),
        ("just words\n", 1, "expected a mapping"),
    ],
)
def test_an_error_names_its_line(tmp_path, text, line, why):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml_file(file)
    assert f"{file}:{line}: " in str(caught.value) and why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_anchors_and_merges_work(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\n")
    assert read_yaml_file(file)[0]["b"] == {"x": 1, "y": 3}


def test_keys_are_text():
    keys = ["1e3", "1.10", "007", "12", "0x1F", "1_000", ".5", "a.b", "2024-01-01", "on"]
    assert list(yaml_value("{" + ", ".join(f"{key}: 1" for key in keys) + "}")) == keys


def test_an_empty_file_sets_nothing(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("# nothing\n")
    assert read_yaml_file(file) == ({}, {})
