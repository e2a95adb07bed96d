"""Every mistake in a config is one line that names the option and what was meant."""

from __future__ import annotations

import pytest

from lingua.args import dataclass_from_dict
from lingua.errors import UserError
from tests.lingua.some_args import Args, complaint, parse


@pytest.mark.parametrize("bad", ["nan", "inf", "-.inf", ".nan", "1e999"])
def test_floats_are_finite(yaml_file, bad):
    message = complaint(f"optim.lr={bad}")
    assert message.startswith("optim.lr=") and message.endswith("expected float, a finite number")
    assert complaint(f"optim.betas=[0.9, {bad}]").startswith("optim.betas[1]=")
    assert "run.yaml:2: optim.lr=" in complaint(yaml_file(f"optim:\n  lr: {bad}\n"))


@pytest.mark.parametrize("bad", ["1.5", "abc", "true", "null", "[1]", "inf", "{a: 1}", "1e-3"])
def test_what_is_no_int_is_refused(yaml_file, bad):
    assert complaint(f"steps={bad}").startswith("steps=")
    message = complaint(yaml_file(f"name: a\nsteps: {bad}\n"))
    assert "run.yaml:2: steps=" in message and "expected int" in message


@pytest.mark.parametrize(
    "option", ["optim.lr=true", "fused=2", "fused=maybe", "mode=slow", "optim.betas=[1]", "data=3"]
)
def test_wrong_types_name_the_option(option):
    name, value = option.split("=")
    assert complaint(option).startswith(f"{name}={value}: expected ")


def test_a_value_that_is_to_be_a_list_is_shown_as_one():
    told = complaint("data.until=a, b")
    assert told == "data.until=a, b: expected list[str]; a list is written [a, b]"
    assert parse("data.until=[a, b]").data.until == ["a", "b"]
    for other in ("{a: 1}", "true", "1.50", ".nan", '"\\n"'):  # written so it would be another
        assert "a list is written" not in complaint(f"data.until={other}")


def test_a_colon_without_a_space_is_told(yaml_file):
    """`{mine:1.0}` is the key `mine:1.0` of nothing."""
    advice = "; YAML wants a space after the colon, in quotes for the shell: '{%s}'"
    for told in (
        complaint("data.sources={v1.0:0.5}"),
        complaint("data={sources: {v1.0:0.5, web: 1}}"),
        complaint(yaml_file("data:\n  sources: {v1.0:0.5}\n")),
    ):
        assert told.endswith("data.sources.v1.0:0.5=null: expected float" + advice % "v1.0: 0.5")
    told = complaint("optim={lr:0.1}")
    assert told == "unknown option optim.lr:0.1" + advice % "lr: 0.1"
    for other in ("data.sources={web: null}", "data.sources={a:b: null2}", "optim={lr:1: 2}"):
        assert "space" not in complaint(other)


def test_a_text_has_no_nul(yaml_file):
    assert complaint(yaml_file('name: "a\\0b"\n')).endswith("expected str")


def test_null_is_no_text(yaml_file):
    assert parse("name=").name == ""
    assert complaint("name=null") == "name=null: expected str"
    assert complaint(yaml_file("name: null\n")).endswith("name=null: expected str")


def test_a_yaml_switch_word_in_a_text_field_asks_for_quotes(yaml_file):
    assert "write 'false'" in complaint(yaml_file("name: off\n"))


@pytest.mark.parametrize(
    "option, meant",
    [
        ("step=3", "steps"),
        ("optim.zzz=3", None),
        ("optim.l_r=3", "optim.lr"),
        ("lr=3", "optim.lr"),
        ("data.sorces.a=3", "data.sources"),
        ("every=3", "dump.every"),
    ],
)
def test_unknown_options_say_what_was_meant(yaml_file, option, meant):
    name, value = option.split("=")
    *above, last = name.split(".")
    text = "".join("  " * i + f"{part}:\n" for i, part in enumerate(above))
    in_file = yaml_file(f"{text}{'  ' * len(above)}{last}: {value}\n")
    want = f"did you mean {meant}?" if meant else "known here: lr, betas, clip"
    for message in complaint(option), complaint(in_file):
        assert f"unknown option {name}" in message or "unknown option data.sorces" in message
        assert want in message


def test_unknown_key_in_a_file_names_the_line(yaml_file):
    assert "run.yaml:3: unknown option optim.l; " in complaint(
        yaml_file("name: x\noptim:\n  l: 1\n")
    )


def test_a_dotted_key_in_a_file_says_how_to_write_it(yaml_file):
    message = complaint(yaml_file("optim.lr: 3\n"))
    assert message.endswith("run.yaml:1: unknown option optim.lr: in YAML, optim: {lr: ...}")


def test_an_option_does_not_hide_a_section_that_is_none(yaml_file):
    assert "run.yaml:1: optim=3: expected a mapping" in complaint(
        yaml_file("optim: 3\n"), "optim.lr=1"
    )
    assert parse(yaml_file("optim:\n"), "optim.lr=1").optim.lr == 1


def test_an_overridden_mistake_in_the_file_is_no_mistake(yaml_file):
    config = yaml_file("steps: many\n")
    assert parse(config, "steps=3").steps == 3
    assert complaint(config, "steps=4.5") == "steps=4.5: expected int"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["foo"], "foo: not understood, write option=value"),
        (["--steps=5"], "write steps=5"),
        (["--steps", "5"], "write steps=VALUE"),
        (["=5"], "not understood"),
        (["steps.x=3"], "steps is int and is set whole"),
        (["data.until.0=3"], "is set whole"),
        (["data..seq_len=3"], "not a dotted option"),
        (["data.=3"], "not a dotted option"),
        (["steps=[1"], "not readable as YAML"),
        (["data.until=[a,"], "not readable as YAML"),
        (["config=a.yaml", "config=b.yaml"], "config= is given 2 times (a.yaml, b.yaml)"),
        (["config=absent.yaml"], "config=absent.yaml: no such file"),
        (["config=/"], "config=/: not readable"),
    ],
)
def test_a_command_line_that_makes_no_sense(argv, said):
    assert said in complaint(*argv)


@pytest.mark.parametrize(
    "text, line",
    [("a: 1\nb: [1\nc: 2\n", 3), ("a:\n\tb: 1\n", 2), ("steps: 1\nsteps: 2\n", 2), ("- 1\n", 1)],
)
def test_broken_yaml_names_the_line(yaml_file, text, line):
    assert f"run.yaml:{line}: " in complaint(yaml_file(text))


def test_messages_of_the_dataclasses_surface(yaml_file):
    want = "optim.lr=-1.0 must be above 0, for example 3e-4"
    assert complaint("optim.lr=-1") == complaint(yaml_file("optim: {lr: -1}\n")) == want


def test_strictness_of_dataclass_from_dict():
    with pytest.raises(UserError, match="did you mean steps?"):
        dataclass_from_dict(Args, {"step": 1})
    loose = dataclass_from_dict(Args, {"step": 1, "data": {"x": 1, "seq_len": 3}}, strict=False)
    assert loose.data.seq_len == 3
