"""What a config promises: precedence, exact values, and one helpful line for every mistake."""
# ruff: noqa: UP006, UP035, UP045  (the spelling of older configs must work, too)

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from lingua.args import (
    UserError,
    dataclass_from_dict,
    dataclass_to_dict,
    describe_fields,
    diff_configs,
    dump_config,
    flatten_dict,
    import_optional,
    load_config_file,
    parse_args,
    run_cli,
    write_atomic,
)


class Mode(Enum):
    FAST = "fast"
    EXACT = "exact"


@dataclass
class Every:
    every: int = 1000  # steps between two
    keep: int = 0


@dataclass
class Data:
    root_dir: Optional[str] = None  # folder of the sources
    sources: Dict[str, float] = field(default_factory=dict)  # source -> weight
    seq_len: int = 2048
    until: List[str] = field(default_factory=list)


@dataclass
class Optim:
    lr: float = 3e-4  # peak rate
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0

    def __post_init__(self):
        if self.lr <= 0:
            raise UserError(f"optim.lr={self.lr} must be above 0, for example 3e-4")


@dataclass
class Eval:
    data: Data = field(default_factory=Data)
    limit: Optional[int] = None


@dataclass
class Args:
    # What the run
    # is called
    name: str = "lingua"
    steps: int = (
        1000  # optimizer steps
    )  # fmt: skip
    fused: bool = True
    mode: Mode = Mode.FAST
    data: Data = field(default_factory=Data)  # where text comes from
    optim: Optim = field(default_factory=Optim)
    dump: Every = field(default_factory=lambda: Every(every=50))
    eval: Optional[Eval] = None  # null = no evaluation
    free: Optional[Any] = None
    prompts: str | list[str] = ""
    width: str | int = "full"


@dataclass
class WithConfigField:
    config: str = ""
    nodes: int = -1


def parse(*argv: str) -> Args:
    return parse_args(Args, argv, prog="prog")


def complaint(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return f"config={path}"

    return write


def test_command_line_beats_file_beats_defaults(yaml_file):
    config = yaml_file("steps: 5\nname: file\noptim: {lr: 0.5}\n")
    args = parse(config, "name=cli", "optim.clip=null")
    assert (args.name, args.steps, args.optim.lr) == ("cli", 5, 0.5)
    assert args.optim.clip is None
    assert args.data.seq_len == 2048
    assert parse("steps=7").steps == 7
    assert parse("steps=7", "steps=8").steps == 8


def test_position_of_config_does_not_matter(yaml_file):
    config = yaml_file("steps: 5\n")
    assert parse("steps=6", config).steps == parse(config, "steps=6").steps == 6


@pytest.mark.parametrize(
    "text, want", [("1e5", 100_000), ("100000", 100_000), ("'1e3'", 1000), ("2.0", 2)]
)
def test_integral_numbers_fit_int_fields(yaml_file, text, want):
    assert parse(f"steps={text}").steps == want
    got = parse(yaml_file(f"steps: {text}\n")).steps
    assert got == want and type(got) is int


@pytest.mark.parametrize("text", ["3e-4", "'3e-4'", "0.0003", "3E-4"])
def test_numbers_fit_float_fields(yaml_file, text):
    assert parse(f"optim.lr={text}").optim.lr == 3e-4
    assert parse(yaml_file(f"optim:\n  lr: {text}\n")).optim.lr == 3e-4
    assert dataclass_from_dict(Args, {"optim": {"lr": text.strip("'")}}).optim.lr == 3e-4
    assert type(parse("optim.lr=1").optim.lr) is float


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


def test_switches_enums_and_tuples():
    args = parse("fused=off", "mode=exact", "optim.betas=[0.8, 1]")
    assert (args.fused, args.mode, args.optim.betas) == (False, Mode.EXACT, (0.8, 1.0))


def test_text_is_kept_as_typed():
    assert parse("name=1e5").name == "1e5"
    assert parse("name=007").name == "007"
    assert parse("name=a: b # c").name == "a: b # c"
    assert parse("name=off").name == "off"
    assert parse("name=it's [odd").name == "it's [odd"
    assert parse("name='null'").name == "null"
    assert parse('name="a\\n"').name == "a\n"
    assert parse("data.root_dir=a=b").data.root_dir == "a=b"
    assert parse("prompts=one, two").prompts == "one, two"
    assert parse("prompts=[one, two]").prompts == ["one", "two"]


def test_of_several_types_a_value_keeps_its_own(yaml_file):
    assert parse("width=3").width == parse(yaml_file("width: 3\n")).width == 3
    assert parse("width=half").width == "half"
    assert parse("width='3'").width == parse(yaml_file("width: '3'\n")).width == "3"


def test_null_is_none_where_it_may_be(yaml_file):
    config = yaml_file("data: {root_dir: x}\neval: {limit: 3}\n")
    assert parse(config).data.root_dir == "x"
    assert parse(config, "data.root_dir=null").data.root_dir is None
    assert parse(config, "eval=null").eval is None
    assert parse(config, "eval.limit=null").eval == Eval()


def test_null_is_no_text(yaml_file):
    assert parse("name=").name == ""
    assert complaint("name=null") == "name=null: expected str"
    assert complaint(yaml_file("name: null\n")).endswith("name=null: expected str")


def test_a_yaml_switch_word_in_a_text_field_asks_for_quotes(yaml_file):
    assert "write 'false'" in complaint(yaml_file("name: off\n"))


def test_source_names_may_hold_dots(yaml_file):
    want = {"dclm_baseline_1.0": 1.0}
    assert parse("data.sources.dclm_baseline_1.0=1").data.sources == want
    assert parse("data.sources[dclm_baseline_1.0]=1").data.sources == want
    assert parse("data[sources][dclm_baseline_1.0]=1").data.sources == want
    assert parse("data.sources={dclm_baseline_1.0: 1}").data.sources == want
    assert parse(yaml_file("data:\n  sources: {dclm_baseline_1.0: 1}\n")).data.sources == want


def test_command_line_sources_replace_the_files(yaml_file):
    config = yaml_file("data:\n  sources: {a: 1, b: 2}\n  seq_len: 8\n  until: [x, y]\n")
    args = parse(config, "data.sources.c=3", "data.sources.d=4", "data.until=[z]")
    assert args.data == Data(sources={"c": 3.0, "d": 4.0}, seq_len=8, until=["z"])


def test_optional_section_is_typed_at_once(yaml_file):
    args = parse(yaml_file("eval:\n  data: {seq_len: 4}\n"), "eval.limit=2")
    assert args.eval == Eval(data=Data(seq_len=4), limit=2)
    assert "did you mean eval.limit?" in complaint(yaml_file("eval: {limt: 2}\n"))
    assert "did you mean eval.data.seq_len?" in complaint("eval.data.seqlen=2")


def test_section_defaults_come_from_the_owner(yaml_file):
    assert parse().dump.every == parse("dump.keep=1").dump.every == 50
    assert parse(yaml_file("dump:\n")).dump == Every(50)  # empty section = defaults


def test_free_field_takes_anything(yaml_file):
    config = yaml_file("free: {a: {b: 1}, c: 2}\n")
    assert parse(config, "free.a.d=3").free == {"a": {"b": 1, "d": 3}, "c": 2}
    assert parse("free=[1, x]").free == [1, "x"]


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


def test_a_section_on_the_command_line_drops_none_of_its_options_that_were_set_before(yaml_file):
    args = parse("optim.lr=2", "optim={clip: 3.0}")
    assert (args.optim.lr, args.optim.clip) == (2.0, 3.0)
    config = yaml_file("eval: {limit: 1}")
    args = parse(config, "eval.data.seq_len=5", "eval={data: {root_dir: x}}")
    assert args.eval is not None
    assert (args.eval.limit, args.eval.data.seq_len, args.eval.data.root_dir) == (1, 5, "x")
    args = parse("data.sources.a=1", "data.sources={b: 2}")  # a mapping of values is set whole
    assert args.data.sources == {"b": 2.0}


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


def test_empty_file_means_defaults(yaml_file):
    assert parse(yaml_file("# nothing\n")) == Args()


def test_messages_of_the_dataclasses_surface(yaml_file):
    want = "optim.lr=-1.0 must be above 0, for example 3e-4"
    assert complaint("optim.lr=-1") == complaint(yaml_file("optim: {lr: -1}\n")) == want


def test_interpolation_reaches_defaults_and_the_environment(yaml_file, monkeypatch):
    monkeypatch.setenv("RUN_NAME", "from-env")
    config = yaml_file("name: ${oc.env:RUN_NAME}\nsteps: ${data.seq_len}\ndata: {seq_len: 12}\n")
    args = parse(config, "eval.limit=${dump.keep}")
    assert (args.name, args.steps) == ("from-env", 12)
    assert args.eval is not None and args.eval.limit == 0
    assert "name" in complaint("name=${nowhere.to.be.seen}")


def test_own_config_field_is_an_ordinary_option():
    args = parse_args(WithConfigField, ["config=run.yaml", "nodes=2"], prog="stool")
    assert args == WithConfigField("run.yaml", 2)


def test_dataclass_round_trip(tmp_path):
    args = parse(
        "data.sources.a_1.0=1", "eval.limit=3", "optim.lr=1e-5", "name='1e5'", "mode=exact"
    )
    plain = dataclass_to_dict(args)
    assert json.loads(json.dumps(plain)) == plain
    assert dataclass_from_dict(Args, plain) == args

    dump_config(args, tmp_path / "config.yaml", log_config=False)
    assert dataclass_from_dict(Args, load_config_file(tmp_path / "config.yaml")) == args


def test_strictness_of_dataclass_from_dict():
    with pytest.raises(UserError, match="did you mean steps?"):
        dataclass_from_dict(Args, {"step": 1})
    loose = dataclass_from_dict(Args, {"step": 1, "data": {"x": 1, "seq_len": 3}}, strict=False)
    assert loose.data.seq_len == 3


def test_flatten_and_diff():
    assert flatten_dict({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a_b": 1, "a_c": {}, "d": [1]}
    old = {"optim": {"lr": 3e-4, "clip": None}, "data": {"sources": {"a": 1.0}}, "steps": 3}
    new = {"optim": {"lr": 1e-4, "clip": None}, "data": {"sources": {"b": 1.0}}, "steps": 3}
    assert diff_configs(old, new) == [
        "data.sources.a: 1.0 -> (absent)",
        "data.sources.b: (absent) -> 1.0",
        "optim.lr: 0.0003 -> 0.0001",
    ]
    assert diff_configs(old, old) == []


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def full(fd):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    write_atomic(path, b"new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


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
        parse_args(Args, ["--help"], prog="run me", description="Does it.", examples=["run me a=b"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for doc in describe_fields(Args):
        assert doc.path in text and doc.meaning in text
    assert "run me a=b" in text and "Does it." in text and "where text comes from" in text


def test_help_may_be_cut_by_head():
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


def test_run_cli_prints_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which it replaces
    monkeypatch.delenv("RANK", raising=False)

    def mistaken(argv):
        raise UserError("steps=0 must be\npositive")

    with pytest.raises(SystemExit) as stop:
        run_cli(mistaken)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: steps=0 must be positive\n"

    def on_a_full_disk(argv):
        Path("/dev/full").write_text("x")

    with pytest.raises(SystemExit) as stop:
        run_cli(on_a_full_disk)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"

    for bug in (ValueError("a bug"), FileNotFoundError("a bug")):

        def broken(argv, bug=bug):
            raise bug

        with pytest.raises(type(bug), match="a bug"):
            run_cli(broken)

    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_cli(interrupted)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"logging\.wandb needs .* pip install -e '\.\[wandb\]'"):
        import_optional("no_such_package_here", extra="wandb", needed_by="logging.wandb")

    # A broken package is not the user's mistake: its traceback says what is wrong.
    (tmp_path / "broken_package_here.py").write_text("import its_own_missing_need")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_own_missing_need"):
        import_optional("broken_package_here", extra="x", needed_by="y")


def test_a_traceback_shows_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("MY_API_KEY", "swordfish-1")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def fail(argv):
        raise RuntimeError(f"refused: {os.environ['MY_API_KEY']}")

    with pytest.raises(RuntimeError) as left:
        run_cli(fail)
    sys.excepthook(left.type, left.value, left.tb)
    err = capsys.readouterr().err
    assert "Traceback" in err and "in fail" in err
    assert "swordfish" not in err and "refused: <MY_API_KEY hidden>" in err
