"""The commands of a session in the terminal, with typed input."""

from __future__ import annotations

import io
import re
import sys

import pytest

from apps.LT2 import generate
from apps.LT2.inference.session import read_block
from tests.LT2.tiny import save_run, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, tiny_model("window", 2, n_layers=1, attention_pattern="3->full"))
    return folder


@pytest.fixture(scope="module")
def free_run(tmp_path_factory):
    """A model that can run any number of loops."""
    folder = tmp_path_factory.mktemp("free_run")
    save_run(folder, tiny_model("gdn", 2, n_layers=1))
    return folder


@pytest.fixture
def talk(monkeypatch, capsys):
    """Type lines into a session; return the output without prompt signs, and stderr."""

    def talk(run, *lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
        text = io.StringIO("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(text, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", text)
        generate.main([f"ckpt={run}", "device=cpu", "max_gen_len=6", *options])
        out, err = capsys.readouterr()
        return out.replace("> ", "").replace("... ", ""), err

    return talk


def test_set_changes_the_next_answers_only(talk, free_run):
    out, err = talk(
        free_run,
        "first",
        "/set temperature 1.5",
        "/set until=['#', \"x y\"]",
        "second",
        "/set temperature",
        "/set",
    )
    cold, _ = talk(free_run, "first", options=("max_gen_len=6",))
    warm, _ = talk(free_run, "first", "second", options=("temperature=1.5",))
    assert out.startswith(cold.strip("\n"))
    assert out.removesuffix("\n").endswith(warm.removesuffix("\n").split("\n", 1)[1])
    assert err.count("\ntemperature: 1.5\n") == 2
    for row in (r"temperature +1\.5 ", r"until +\[#, x y\] ", r"loop_count +null "):
        assert re.search(rf"^ {row}", err, re.M)
    assert not re.search("^ (ckpt|prompts) ", err, re.M)


MISTAKES = {
    "/set temprature 0.5": "temperature",
    "/set temperature warm": "temperature=warm",
    "/set temperature -1": "temperature=-1",
    "/set num_samples 2": "num_samples=2",
    "/set max_gen_len 5000": "max_gen_len=5000",
    "/set reduce_generation_overhead true": "reduce_generation_overhead=true",
    "/set device tpu": "device=tpu",
    "/set ckpt runs/other": "ckpt=runs/other",
    "/set dump_dir runs/other": "ckpt=runs/other",
    "/set prompts [a]": "prompts=[a]",
    "/loops 0": "loop_count=0",
    "/loops many": "loop_count=many",
    "/loops 3": "loop_count=3",  # the pattern has two segments
    "/sett": "/sett",
    "/usr/bin": "/usr/bin",
}


def test_mistakes_are_one_line_each_and_change_nothing(talk, run):
    out, err = talk(run, *MISTAKES, "first")
    assert out == talk(run, "first")[0]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    for error, named in zip(errors, MISTAKES.values(), strict=True):
        assert named in error


def test_loops_give_the_answers_of_a_fresh_start(talk, free_run):
    """No state of the prompts before, which ran with other loops, is used."""
    prompts, sampled = ["one", "two", "three", "four"], ("temperature=1.5",)

    def fresh(*options: str) -> list[str]:
        return talk(free_run, *prompts, options=(*sampled, *options))[0].split("\n")

    lines = ["one", "/loops 4", "two", "/loops 1", "three", "/loops null", "four"]
    out, err = talk(free_run, *lines, options=sampled)
    trained, four, one = fresh(), fresh("loop_count=4"), fresh("loop_count=1")
    assert out.split("\n") == [trained[0], four[1], one[2], *trained[3:]]
    assert four[1] != trained[1] and one[2] != trained[2]
    assert re.findall(r"^loops: (\d)$", err, re.M) == ["4", "1", "2"]


def test_reset_restores_the_start(talk, free_run):
    lines = ["/set temperature 1.5", "one", "/loops 3", "/reset"]
    out, _ = talk(free_run, *lines, "one", options=("temperature=1.0",))
    want, _ = talk(free_run, "one", options=("temperature=1.0",))
    assert out.endswith(want)


@pytest.mark.parametrize(
    "lines, prompt",
    [
        (['"""', "def f():", "    x", '"""'], "def f():\n    x"),
        (['"""def f():', '    x"""'], "def f():\n    x"),
        (['"""', "", "x", "", '"""'], "\nx\n"),
        (['"""/usr/bin"""'], "/usr/bin"),
        (['""""""'], ""),
        (['say """x"""'], 'say """x"""'),
    ],
)
def test_a_prompt_in_triple_quotes(lines, prompt, monkeypatch):
    rest = iter(lines[1:])
    monkeypatch.setattr("builtins.input", lambda _: next(rest))
    assert read_block(lines[0]) == prompt


def test_quit_and_an_unfinished_block_end_the_session(talk, run):
    assert talk(run, "/quit", "first")[0] == ""
    assert talk(run, '"""', "first")[0] == "\n"


def test_ctrl_c_at_the_prompt_drops_what_was_typed(talk, run, monkeypatch):
    typed = iter(['"""a', KeyboardInterrupt, "first", EOFError])

    def type_line(_):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    want, _ = talk(run, "first")
    monkeypatch.setattr("builtins.input", type_line)
    out, err = talk(run)
    assert out == want and "/quit" in err


def test_help_names_every_command(talk, run):
    _, err = talk(run, "/help")
    assert all(f"/{name}" in err for name in ("set", "loops", "reset", "help", "quit"))
    assert len(max(err.splitlines(), key=len)) <= 80
