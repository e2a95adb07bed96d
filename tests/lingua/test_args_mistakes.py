"""A mistake in a config is an error of one line that names the option and a remedy."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lingua.args import dataclass_from_dict, parse_args
from lingua.errors import UserError
from tests.lingua.some_args import Args, complaint, parse


@pytest.mark.parametrize("bad", ["nan", "inf", "-.inf", ".nan"])
def test_floats_must_be_finite(yaml_file, bad):
    assert complaint(f"optim.lr={bad}").startswith("optim.lr=")
    message = complaint(yaml_file(f"optim:\n  lr: {bad}\n"))
    assert "run.yaml:2: optim.lr=" in message and "finite" in message


@pytest.mark.parametrize("bad", ["1.5", "abc", "true", "null", "[1]", "{a: 1}", "1e-3"])
def test_ints_reject_other_values(yaml_file, bad):
    assert complaint(f"steps={bad}").startswith("steps=")
    message = complaint(yaml_file(f"name: a\nsteps: {bad}\n"))
    assert "run.yaml:2: steps=" in message and "int" in message


@pytest.mark.parametrize(
    "option",
    ["optim.lr=true", "fused=2", "fused=maybe", "mode=slow", "grid.a=1", "data=3", "name=null"],
)
def test_wrong_types_name_the_option(yaml_file, option):
    name, value = option.split("=")
    message = complaint(option)
    assert message.startswith(name.removesuffix(".a")) and value in message
    *above, last = name.split(".")
    text = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(above))
    in_file = yaml_file(f"{text}{'  ' * len(above)}{last}: {value}\n")
    assert f"run.yaml:{1 if 'grid' in name else len(above) + 1}: {message}" in complaint(in_file)


def test_a_list_without_brackets_shows_how_to_write_it():
    message = complaint("data.until=a, b")
    assert "[a, b]" in message and '["a, b"]' in message
    assert parse("data.until=[a, b]").data.until == ["a", "b"]


def test_a_colon_without_a_space_is_explained(yaml_file):
    """YAML reads `{web:1.0}` as the key `web:1.0` without a value."""
    assert "data.sources={web:1.0}" in (message := complaint("data.sources={web:1.0}"))
    assert "space after the colon" in message
    assert "optim={lr:0.1}" in complaint("optim={lr:0.1}")
    message = complaint(yaml_file("data:\n  sources: {web:0.5}\n"))
    assert "run.yaml:2:" in message and "web:0.5" in message and "space" in message
    assert parse("data.sources={a:b: 1}").data.sources == {"a:b": 1.0}


def test_a_boolean_in_a_text_field_asks_for_quotes(yaml_file):
    assert parse("name=true").name == "true"
    message = complaint(yaml_file("name: true\n"))
    assert "run.yaml:1: name=true" in message and "'true'" in message


def test_null_is_not_text():
    assert parse("name=").name == ""
    assert parse("data.root_dir=").data.root_dir is None


@pytest.mark.parametrize(
    "option, meant",
    [
        ("step=3", "steps"),
        ("optim.zzz=3", None),
        ("optim.l_r=3", "optim.lr"),
        ("optim.learning_rate=3", "optim.lr"),
        ("lr=3", "optim.lr"),
        ("data.sorces.a=3", "data.sources"),
        ("every=3", "dump.every"),
    ],
)
def test_unknown_options_suggest_a_known_one(yaml_file, option, meant):
    name, value = option.split("=")
    *above, last = name.split(".")
    text = "".join("  " * i + f"{part}:\n" for i, part in enumerate(above))
    in_file = yaml_file(f"{text}{'  ' * len(above)}{last}: {value}\n")
    want = f"did you mean {meant}?" if meant else "known here: lr, clip"
    for message in complaint(option), complaint(in_file):
        assert f"unknown option {name}" in message or "unknown option data.sorces" in message
        assert want in message


def test_unknown_key_in_a_file_names_the_line(yaml_file):
    assert "run.yaml:3: unknown option optim.l; " in complaint(
        yaml_file("name: x\noptim:\n  l: 1\n")
    )


def test_an_option_does_not_hide_a_wrong_section(yaml_file):
    assert "run.yaml:1: optim=3" in complaint(yaml_file("optim: 3\n"), "optim.lr=1")
    assert parse(yaml_file("optim:\n"), "optim.lr=1").optim.lr == 1


def test_the_command_line_overrides_a_mistake_in_the_file(yaml_file):
    config = yaml_file("steps: many\n")
    assert parse(config, "steps=3").steps == 3
    assert complaint(config, "steps=4.5").startswith("steps=4.5")


@pytest.mark.parametrize(
    "argv, part",
    [
        (["foo"], "foo: write option=value"),
        (["--steps=5"], "write steps=5"),
        (["--steps", "5"], "write steps=VALUE"),
        (["=5"], "write option=value"),
        (["steps.x=3"], "steps.x: steps is int"),
        (["data.until.0=3"], "data.until.0: data.until is list[str]"),
        (["data..seq_len=3"], "unknown option data."),
        (["steps=[1"], "steps=[1: not YAML"),
        (["data.until=[a,"], "data.until=[a,: not YAML"),
        (["config=a.yaml", "config=b.yaml"], "config= is given 2 times (a.yaml, b.yaml)"),
        (["config=absent.yaml"], "config=absent.yaml: no such file"),
        (["config=/"], "config=/ is a folder"),
    ],
)
def test_malformed_command_lines(argv, part):
    assert part in complaint(*argv)


@pytest.mark.parametrize(
    "text, line",
    [("a: 1\nb: [1\nc: 2\n", 3), ("a:\n\tb: 1\n", 2), ("steps: 1\nsteps: 2\n", 2), ("- 1\n", 1)],
)
def test_broken_yaml_names_the_line(yaml_file, text, line):
    assert f"run.yaml:{line}: " in complaint(yaml_file(text))


def test_errors_of_the_dataclasses_are_shown(yaml_file):
    want = "optim.lr=-1.0 must be above 0, for example 3e-4"
    assert complaint("optim.lr=-1") == complaint(yaml_file("optim: {lr: -1}\n")) == want


def test_a_required_option_must_be_given():
    @dataclass
    class Required:
        ckpt: str

    for argv in [], ["ckpt=???"]:
        with pytest.raises(UserError, match="^ckpt is not set"):
            parse_args(Required, argv)


def test_strictness_of_dataclass_from_dict():
    with pytest.raises(UserError, match="did you mean steps?"):
        dataclass_from_dict(Args, {"step": 1})
    loose = dataclass_from_dict(Args, {"step": 1, "data": {"x": 1, "seq_len": 3}}, strict=False)
    assert loose.data.seq_len == 3
