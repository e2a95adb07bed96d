"""Precedence of defaults, file and command line, and values that keep their meaning."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from lingua.args import (
    dataclass_from_dict,
    dataclass_to_dict,
    diff_configs,
    dump_config,
    flatten_dict,
    load_config_file,
    parse_args,
)
from lingua.errors import UserError
from lingua.files.atomic import write_atomic
from tests.lingua.some_args import Args, Data, Eval, Every, complaint, parse


@dataclass
class WithConfigField:
    config: str = ""
    nodes: int = -1


def test_command_line_beats_file_beats_defaults(yaml_file):
    config = yaml_file("steps: 5\nname: file\noptim: {lr: 0.5}\n")
    args = parse(config, "name=cli", "optim.clip=null")
    assert (args.name, args.steps, args.optim.lr) == ("cli", 5, 0.5)
    assert args.optim.clip is None
    assert args.data.seq_len == 2048
    assert parse("steps=7", "steps=8").steps == 8


def test_position_of_config_does_not_matter(yaml_file):
    config = yaml_file("steps: 5\n")
    assert parse("steps=6", config).steps == parse(config, "steps=6").steps == 6


@pytest.mark.parametrize("text, want", [("1e5", 100_000), ("100000", 100_000), ("2.0", 2)])
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


def test_switches_literals_and_paths(yaml_file):
    args = parse("fused=off", "mode=exact", "folder=a/b")
    assert (args.fused, args.mode, args.folder) == (False, "exact", Path("a/b"))
    assert parse(yaml_file("fused: no\n")).fused is False


def test_text_is_kept_as_typed(yaml_file):
    assert parse("name=1e5").name == "1e5"
    assert parse("name=007").name == "007"
    assert parse("name=a: b # c").name == "a: b # c"
    assert parse("name=off").name == parse(yaml_file("name: off\n")).name == "off"
    assert parse("name=it's [odd").name == "it's [odd"
    assert parse("name='null'").name == "null"
    assert parse('name="a\\n"').name == "a\n"
    assert parse("data.root_dir=a=b").data.root_dir == "a=b"


def test_a_union_keeps_the_type_of_the_value(yaml_file):
    assert parse("width=3").width == parse(yaml_file("width: 3\n")).width == 3
    assert parse("width=half").width == "half"
    assert parse("width='3'").width == parse(yaml_file("width: '3'\n")).width == "3"


def test_null_sets_optional_fields_to_none(yaml_file):
    config = yaml_file("data: {root_dir: x}\neval: {limit: 3}\n")
    assert parse(config).data.root_dir == "x"
    assert parse(config, "data.root_dir=null").data.root_dir is None
    assert parse(config, "eval=null").eval is None
    assert parse(config, "eval.limit=null").eval == Eval()
    assert parse(config, "eval=null", "eval.data.seq_len=4").eval == Eval(data=Data(seq_len=4))


def test_source_names_may_hold_dots(yaml_file):
    want = {"dclm_baseline_1.0": 1.0}
    assert parse("data.sources.dclm_baseline_1.0=1").data.sources == want
    assert parse("data.sources[dclm_baseline_1.0]=1").data.sources == want
    assert parse("data[sources][dclm_baseline_1.0]=1").data.sources == want
    assert parse("data.sources={dclm_baseline_1.0: 1}").data.sources == want
    assert parse(yaml_file("data:\n  sources: {dclm_baseline_1.0: 1}\n")).data.sources == want


def test_keys_in_a_file_may_be_dotted(yaml_file):
    sources = "data.sources.a_1.0: 1\ndata.sources.b: 2\n"
    args = parse(yaml_file(f"optim.lr: 0.5\noptim: {{clip: 2}}\n{sources}"))
    assert (args.optim.lr, args.optim.clip) == (0.5, 2.0)
    assert args.data.sources == {"a_1.0": 1.0, "b": 2.0}
    assert "run.yaml:1: optim.lr=x" in complaint(yaml_file("optim.lr: x\n"))


def test_command_line_dicts_and_lists_replace_the_files(yaml_file):
    config = yaml_file(
        "data:\n  sources: {a: 1, b: 2}\n  seq_len: 8\n  until: [x, y]\nfree: {a: 1}"
    )
    args = parse(config, "data.sources.c=3", "data.sources.d=4", "data.until=[z]", "free={b: 2}")
    assert args.data == Data(sources={"c": 3.0, "d": 4.0}, seq_len=8, until=["z"])
    assert args.free == {"b": 2}
    assert parse("data.sources.a=1", "data.sources={b: 2}").data.sources == {"b": 2.0}


def test_any_keeps_the_value_that_yaml_reads():
    assert parse("free=[1, x, 4:1, {a: 1e-3}]").free == [1, "x", "4:1", {"a": 1e-3}]
    assert parse("grid.optim.lr=[1, x]", "grid.a=[null]").grid == {
        "optim.lr": [1, "x"],
        "a": [None],
    }


def test_optional_section_is_typed_when_read(yaml_file):
    args = parse(yaml_file("eval:\n  data: {seq_len: 4}\n"), "eval.limit=2")
    assert args.eval == Eval(data=Data(seq_len=4), limit=2)
    assert parse(yaml_file("eval: {}\n")).eval == parse("eval={}").eval == Eval()
    assert "did you mean eval.limit?" in complaint(yaml_file("eval: {limt: 2}\n"))
    assert "did you mean eval.data.seq_len?" in complaint("eval.data.seqlen=2")


def test_section_defaults_come_from_the_owner(yaml_file):
    assert parse().dump.every == parse("dump.keep=1").dump.every == 50
    assert parse(yaml_file("dump:\n")).dump == Every(50)  # an empty section means the defaults


def test_a_section_on_the_command_line_keeps_options_set_before(yaml_file):
    args = parse("optim.lr=2", "optim={clip: 3.0}")
    assert (args.optim.lr, args.optim.clip) == (2.0, 3.0)
    config = yaml_file("eval: {limit: 1}")
    args = parse(config, "eval.data.seq_len=5", "eval={data: {root_dir: x}}")
    assert args.eval == Eval(data=Data(root_dir="x", seq_len=5), limit=1)


def test_empty_file_means_defaults(yaml_file):
    assert parse(yaml_file("# nothing\n")) == Args()


def test_interpolation_reaches_defaults_sections_and_the_environment(yaml_file, monkeypatch):
    monkeypatch.setenv("RUN_NAME", "from-env")
    config = yaml_file("name: ${oc.env:RUN_NAME}\nsteps: ${data.seq_len}\ndata: {seq_len: 12}\n")
    args = parse(config, "eval.limit=${dump.keep}", "eval.data=${data}")
    assert (args.name, args.steps) == ("from-env", 12)
    assert args.eval == Eval(data=Data(seq_len=12), limit=0)


@pytest.mark.parametrize("bad", ["${nowhere.to.be.seen}", "${unclosed", "${oc.env:NOT_SET}"])
def test_interpolation_errors_name_the_option(yaml_file, bad):
    assert complaint(f"steps={bad}").startswith("steps=${")
    assert "run.yaml:2: name=${" in complaint(yaml_file(f"steps: 1\nname: '{bad}'\n"))


def test_own_config_field_is_an_ordinary_option():
    args = parse_args(WithConfigField, ["config=run.yaml", "nodes=2"], prog="stool")
    assert args == WithConfigField("run.yaml", 2)


def test_dataclass_round_trip(tmp_path):
    args = parse("data.sources.a_1.0=1", "eval.limit=3", "optim.lr=1e-5", "name='1e5'", "folder=x")
    plain = dataclass_to_dict(args)
    assert json.loads(json.dumps(plain)) == plain
    assert dataclass_from_dict(Args, plain) == args

    dump_config(args, tmp_path / "config.yaml", log_config=False)
    assert dataclass_from_dict(Args, load_config_file(tmp_path / "config.yaml")) == args


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
    newer = {"optim": {"betas": 2, "eps": 1e-8}, "steps": 3}
    assert diff_configs({"steps": 3}, newer, {"optim": {"betas": 1, "eps": 1e-8}, "data": {}}) == [
        "optim.betas: 1 -> 2"
    ]


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def full(fd):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    write_atomic(path, b"new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


@dataclass
class Reader:
    POSITIONAL: ClassVar = "ckpt"
    ALIASES: ClassVar = {"dump_dir": "ckpt"}

    ckpt: str = ""
    steps: int = 1


@pytest.mark.parametrize(
    "path", ["runs/a", "a", ".", "/", "runs/lr=1e-3,T=2", "/lr=1", "a b/c.pth", "../a=b/c=d"]
)
def test_a_path_needs_no_name(path, yaml_file):
    for argv in ([path, "steps=2"], ["steps=2", path], ["steps=2", f"dump_dir={path}"]):
        assert parse_args(Reader, argv) == Reader(path, 2)
    assert parse_args(Reader, [yaml_file("dump_dir: b\n"), path]) == Reader(path)


def test_one_path_at_most():
    with pytest.raises(UserError, match="^5: write option=value"):
        parse_args(Reader, ["runs/a", "5"])
    with pytest.raises(UserError, match="--steps"):
        parse_args(Reader, ["runs/a", "--steps"])
    assert complaint("runs/a").startswith("runs/a: write option=value")
