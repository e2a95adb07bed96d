"""apps.LT2.generate: sources of prompts, output, and errors."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from apps.LT2 import generate
from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from lingua.errors import UserError
from lingua.tokenizer import ByteTokenizer
from tests.lingua.tokenizer_kinds import TOKENIZER_KINDS, make_tokenizer
from tests.LT2.tiny import save_run, tiny_model

PROMPTS = ["first", "", "third one"]
OPTIONS = ["max_gen_len=6", "device=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, tiny_model("hybrid", 2))
    return folder


@pytest.fixture(scope="module")
def answers():
    cfg = PackedCausalTransformerGeneratorArgs(max_gen_len=6)
    generator = PackedCausalTransformerGenerator(cfg, tiny_model("hybrid", 2), ByteTokenizer())
    return generator.generate(PROMPTS)[0]


@pytest.fixture
def ask(run, monkeypatch, capsys):
    """Run the command with a text on stdin; return its output."""

    def ask(*argv: str, stdin: str = "", tty: bool = False) -> str:
        coding = {"encoding": "utf-8", "errors": "surrogateescape"}  # as in the C locale
        text = io.TextIOWrapper(io.BytesIO(stdin.encode(**coding)), **coding)
        text.isatty = lambda: tty  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", text)
        generate.main([f"ckpt={run}", *OPTIONS, *argv])
        return capsys.readouterr().out

    return ask


def shown(prompts, answers) -> str:
    n = len(prompts)
    return "".join(
        f"[{i}/{n}] prompt: {prompt}\n[{i}/{n}] answer: {answer}\n\n"
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1)
    )


def test_prompts_from_options_a_file_and_stdin(ask, tmp_path, answers):
    want = shown(PROMPTS, answers)
    assert ask(f"prompts={PROMPTS!r}") == want
    assert ask(stdin="\n".join(PROMPTS)) == want
    lines = "\n".join(PROMPTS) + "\n"
    texts = {"unix": lines, "dos": "\r\n".join(PROMPTS), "byte order mark": "\ufeff" + lines}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, newline="")
        assert ask(f"prompts_file={tmp_path / name}") == want


def test_a_single_prompt_is_continued_in_place(ask, answers):
    assert ask("prompts=[first]") == f"first{answers[0]}\n"


def test_a_single_answer_is_streamed(run, monkeypatch, answers):
    writes: list[str] = []
    step = generate.PackedCausalTransformerGenerator._choose

    def choose(self, logits, sequences):
        writes.append("<step>")
        return step(self, logits, sequences)

    class Out(io.StringIO):
        def write(self, text):
            writes.append(text)
            return len(text)

    monkeypatch.setattr(generate.PackedCausalTransformerGenerator, "_choose", choose)
    monkeypatch.setattr(sys, "stdout", Out())
    generate.main([f"ckpt={run}", *OPTIONS, "prompts=[first]"])
    assert "".join(w for w in writes if w != "<step>") == f"first{answers[0]}\n"
    assert writes[0] == "first" and writes[-1] == "\n"
    first_text = next(i for i, w in enumerate(writes) if i and w not in ("<step>", ""))
    assert "<step>" in writes[first_text:], "all text was printed after the last step"


def test_a_conversation_equals_a_list_and_survives_an_error(ask, capsys):
    lines = ["first", "x" * 2000, "third one"]
    sampled = ["temperature=1.0"]
    out = ask(*sampled, stdin="\n".join(lines) + "\n", tty=True)
    in_a_list = ask(*sampled, stdin="first\nshort\nthird one\n")
    for place in ("[1/3]", "[3/3]"):
        answer = in_a_list.partition(f"{place} answer: ")[2].partition("\n\n")[0]
        assert answer in out


def test_a_damaged_newest_checkpoint_is_reported_once(tmp_path, caplog):
    model = tiny_model("window", 1, n_layers=1)
    save_run(tmp_path, model, step=1)
    (save_run(tmp_path, model, step=2) / "params.json").unlink()
    generate.main([f"ckpt={tmp_path}", *OPTIONS, "prompts=[a]"])
    assert caplog.text.count("0000000002 is damaged") == 1


def test_the_seed_selects_the_answer(ask):
    once, again, other = (ask("temperature=1.5", "prompts=[first]", f"seed={n}") for n in (7, 7, 8))
    assert once == again != other


def test_samples_are_numbered_and_the_first_equals_a_single_one(ask):
    options = ["temperature=1.0", "seed=3"]
    one = ask(*options, stdin="first\nsecond\n")
    three = ask(*options, "num_samples=3", stdin="first\nsecond\n")
    for place in ("[1/2]", "[2/2]"):
        answers = [three.partition(f"{place} answer {k}: ")[2].partition("\n[")[0] for k in (1, 2)]
        assert f"{place} answer: {answers[0]}\n" in one
        assert len(set(answers)) == 2 and f"{place} answer 3: " in three
    alone = ask(*options, "num_samples=2", "prompts=[first]")
    assert alone.startswith("[1/1] prompt: first\n[1/1] answer 1: ")
    talk = ask(*options, "num_samples=2", stdin="first\n", tty=True)
    for k in (1, 2):
        text = alone.partition(f"answer {k}: ")[2].partition("\n")[0]
        assert f"[{k}/2] {text}" in talk


# ---- bad prompts

BAD = ["first", "x" * 1100, "", "y" * 1200, "third one"]


def bad_file(tmp_path, *lines: bytes) -> str:
    (tmp_path / "prompts.txt").write_bytes(b"\n".join(lines))
    return f"prompts_file={tmp_path}/prompts.txt"


def test_bad_prompts_are_rejected_before_anything_runs(ask, tmp_path, capsys):
    file = bad_file(tmp_path, *(line.encode() for line in BAD))
    with pytest.raises(UserError) as caught:
        ask(file)
    message = str(caught.value)
    assert message.startswith(f"{file}, line 2: ") and "1101 tokens" in message
    assert "1 more" in message and "skip_bad_prompts=true" in message
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"^prompts\[1\]: .*1101 tokens"):
        ask(f"prompts={BAD!r}")


def test_skip_bad_prompts_runs_the_others(ask, tmp_path, capsys):
    sampled = ["temperature=1.0"]
    with pytest.raises(UserError, match="line 6: not UTF-8: .* at byte 4"):
        ask(bad_file(tmp_path, *(line.encode() for line in ("a", "", "b", "c", "d")), b"caf\xe9"))
    file = bad_file(tmp_path, *(line.encode() for line in BAD), b"caf\xe9")
    assert capsys.readouterr().err == ""
    generate_out = ask(file, "skip_bad_prompts=true", *sampled)
    want = ask("prompts=" + repr(["first", "a", "", "b", "third one", "c"]), *sampled)
    for place in (1, 3, 5):  # places keep their random numbers
        label = f"[{place}/6] "
        lines = [line for line in want.splitlines() if line.startswith(label)]
        assert lines and all(line in generate_out.splitlines() for line in lines)
    assert "[2/6]" not in generate_out and "[6/6]" not in generate_out


def test_skipped_prompts_are_reported_on_stderr(run, capsys, tmp_path):
    file = bad_file(tmp_path, b"caf\xe9", b"fine", b"x" * 1100)
    generate.main([f"ckpt={run}", *OPTIONS, file, "skip_bad_prompts=true"])
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("skipped: ")]
    assert [x.partition(f"{file}, ")[2][:6] for x in lines] == ["line 1", "line 3"]


def test_skip_bad_prompts_needs_one_good_prompt(ask):
    with pytest.raises(UserError, match=r"^stdin, line 1: not UTF-8"):
        ask("skip_bad_prompts=true", stdin="a\udcffb")
    with pytest.raises(UserError, match=r"^prompts\[0\]: .*1101 tokens"):
        ask("skip_bad_prompts=true", f"prompts=[{'x' * 1100}]")


# ---- Ctrl-C and errors


def test_ctrl_c_stops_an_answer_but_not_the_conversation(ask, monkeypatch, answers):
    step = generate.PackedCausalTransformerGenerator._choose
    n_calls = 0

    def choose(self, logits, sequences):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise KeyboardInterrupt
        return step(self, logits, sequences)

    monkeypatch.setattr(generate.PackedCausalTransformerGenerator, "_choose", choose)
    out = ask("until=[never]", stdin="third one\nfirst\n", tty=True)
    assert n_calls == 3 + 6
    assert answers[0] in out and answers[2] not in out


def test_a_model_trained_without_bos_gets_none(tmp_path, capsys):
    config = {"data": {"tokenizer": {"name": "bytes"}, "add_bos": False}}
    model = tiny_model("hybrid", 2)
    save_run(tmp_path, model, **config)
    generate.main([f"ckpt={tmp_path}", "max_gen_len=1", "device=cpu", "prompts=[first]"])
    token = int(model(torch.tensor([[*b"first"]]))[0, -1].argmax())
    assert capsys.readouterr().out == f"first{ByteTokenizer().decode([token])}\n"


@pytest.mark.parametrize("prompt", ["The ", "日本"])
def test_the_printed_text_is_the_decoded_tokens(prompt, tmp_path, capsys):
    tokenizer = make_tokenizer("sp-bpe")
    model = tiny_model("full", 1, n_layers=1, vocab_size=tokenizer.n_words)
    path = TOKENIZER_KINDS["sp-bpe"](tmp_path)[1]
    save_run(tmp_path, model, data={"tokenizer": {"name": "sp", "path": path}})
    tokens = tokenizer.encode(prompt, True, False)
    cfg = PackedCausalTransformerGeneratorArgs(max_gen_len=6)
    (answer,) = PackedCausalTransformerGenerator(cfg, model, tokenizer).complete([tokens])
    generate.main([f"ckpt={tmp_path}", *OPTIONS, "dtype=fp32", f"prompts=['{prompt}']"])
    text = tokenizer.decode(tokens + answer.tokens)
    assert capsys.readouterr().out.strip() == text.strip()
    generate.main([f"ckpt={tmp_path}", *OPTIONS, f"prompts=['{prompt}', 'x']"])
    assert f"answer: {answer.text}\n" in capsys.readouterr().out


def test_a_cut_prompt_is_printed_whole(ask):
    assert ask("prompts=[first]", "max_prompt_len=2").startswith("first")


def test_loop_count_is_used(ask, answers, caplog):
    assert ask("prompts=[first]", "loop_count=4") != f"first{answers[0]}\n"
    assert "loop_count=4" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        (["prompts=[]"], "^prompts="),
        ([], "^stdin"),
        (["prompts_file=nowhere.txt"], "prompts_file=nowhere.txt"),
        (["prompts=[a]", "prompts_file=b"], "prompts_file=b: prompts"),
        (["prompts=[a]", "temperature=-1"], "temperature=-1"),
        (["prompts=[a]", "top_p=2"], "top_p=2"),
        (["prompts=[a]", "top_k=-2"], "top_k=-2"),
        (["prompts=[a]", "reduce_generation_overhead=true"], "reduce_generation_overhead=true"),
        (["prompts=[a]", "max_genlen=3"], "max_genlen; did you mean max_gen_len"),
        (["prompts=[a]", "max_tokens=7"], r"^prompts\[0\]: .*2 tokens.*max_tokens=7"),
        (["prompts=[a]", "num_samples=0"], "num_samples=0"),
        (["prompts=[a]", "num_samples=2"], "num_samples=2.*temperature=0"),
        (["prompts=[a]", "loop_count=0"], "loop_count=0"),
    ],
)
def test_invalid_options_are_user_errors(ask, options, message):
    with pytest.raises(UserError, match=message):
        ask(*options)


def test_an_error_is_one_line_and_status_2(quick_python):
    command = ["-m", "apps.LT2.generate", "ckpt=/nowhere"]
    done = quick_python.run(*command, input="x", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ckpt=/nowhere") and done.stderr.count("\n") == 1
