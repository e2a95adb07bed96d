"""`apps.LT2.scripts.prepare`: from own texts to a step of training, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from apps.LT2 import train as app
from apps.LT2.scripts import prepare
from lingua.errors import UserError
from lingua.prepare import shuffle as shuffling
from lingua.tokenizer import build_tokenizer
from tests.LT2.tiny_run import OPTIONS, SMALL, clean_process, without_code_copy


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(file: Path, n: int, key: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({key: f"text {i} of many"}) + "\n" for i in range(n)))
    return file


def manifest(out: str = "data/mine_shuffled") -> dict:
    return json.loads(Path(out, "manifest.json").read_text())


def files(folder: str) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.mark.parametrize("options", [[], ["--train_tokenizer", "300"]])
def test_the_printed_command_trains(here, capsys, options):
    """Also in another folder than the repository, with a blank in the name of the data."""
    write_lines(here / "my texts" / "a.jsonl", 200, "body")
    prepare.main(["my texts", "--text_field", "body", "--out", "my data", *options])
    summary, command = capsys.readouterr().out.splitlines()[-2:]
    assert re.match(r"my data: 200 documents, .*\(10\); about [\d,]{4,} tokens", summary)
    program, config, *argv = shlex.split(command)[2:]
    assert program == "apps.LT2.train"
    small = {k: v for k, v in (OPTIONS | SMALL).items() if not k.startswith("data.tokenizer")}
    small = [f"{k}={'null' if v is None else v}" for k, v in (small | {"steps": 1}).items()]
    with clean_process(), without_code_copy():
        app.main([config, *argv, *small])
    records = Path("runs/my_texts/metrics.jsonl").read_text().splitlines()
    assert "loss/val" in json.loads(records[-1])
    tokenizer = "my data/tokenizer.json" if options else "bytes"  # not the recipe's file
    assert f" tokenizer {tokenizer}, " in Path("runs/my_texts/train.log").read_text()


def test_a_tokenizer_is_trained_once(here, capsys):
    write_lines(here / "mine.jsonl", 50)
    prepare.main(["mine.jsonl"])
    prepare.main(["mine.jsonl", "--train_tokenizer", "270"])  # later, without a second shuffle
    file = Path("data/mine_shuffled/tokenizer.json")
    tokenizer = build_tokenizer("hf", str(file))
    assert 258 < tokenizer.n_words <= 270
    assert tokenizer.decode(tokenizer.encode("über 日", True, True)) == "über 日"
    before = files("data")
    prepare.main(["mine.jsonl", "--train_tokenizer", "270"])
    assert files("data") == before
    with pytest.raises(UserError, match="--train_tokenizer 280.*move it away"):
        prepare.main(["mine.jsonl", "--train_tokenizer", "280"])
    assert files("data") == before
    file.unlink()
    prepare.main(["mine.jsonl", "--train_tokenizer", "280"])
    (Path("data/mine_shuffled/manifest.json")).write_text(
        json.dumps({k: v for k, v in manifest().items() if k != "tokenizer"})
    )
    with pytest.raises(UserError, match="tokenizer.json exists"):  # of another program
        prepare.main(["mine.jsonl", "--train_tokenizer", "280"])


@pytest.mark.parametrize(
    "n, n_validation, n_chunks", [(1, 0, 1), (2, 1, 1), (60, 3, 1), (1000, 50, 8)]
)
def test_few_documents_have_a_share_held_out(here, n, n_validation, n_chunks):
    write_lines(here / "mine.jsonl", n)
    prepare.main(["mine.jsonl"])
    request = manifest()["request"]
    assert (request["validation_documents"], request["nchunks"]) == (n_validation, n_chunks)
    prepare.main(["mine.jsonl", "--validation_documents", str(n_validation)])  # the same request


def test_many_documents_have_10000_held_out():
    plan = shuffling.ShufflePlan("x", seed=1, n_chunks=None, n_validation=None, memory=1)
    assert plan.request(10**6)["validation_documents"] == 10_000


def test_one_document_may_be_longer_than_what_is_counted(here, capsys, monkeypatch):
    monkeypatch.setattr("lingua.prepare.tokenizer.COUNTED_BYTES", 10)
    (here / "mine.txt").write_text("x" * 5000)
    prepare.main(["mine.txt"])
    assert re.search(r"about 5,\d\d\d tokens", capsys.readouterr().out)


def test_names_of_splits_are_skipped_in_a_folder_only(here, capsys):
    for name in ("train.txt", "test.txt", "dev.md"):
        (here / "mine").mkdir(exist_ok=True)
        (here / "mine" / name).write_text(name)
    prepare.main(["mine"])
    assert "splits skipped: test (1)" in capsys.readouterr().out
    assert manifest()["sources"].keys() == {"train.txt", "dev.md"}
    prepare.main(["mine/test.txt"])
    assert manifest("data/test_shuffled")["documents"] == 1


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_partial_files_are_removed_after_an_error(here, error, monkeypatch):
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(here / "mine" / name, 30)

    def fail(*_):
        assert list((here / "data/mine_shuffled.unfinished/piles").iterdir())
        raise error("b.jsonl:31")

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(shuffling._Shuffle, "write_chunks", fail)
        prepare.main(["mine"])
    assert list((here / "data").iterdir()) == []
    # The work of a run that was killed stays, and is resumed.
    monkeypatch.setattr(shuffling, "_removed_on_error", lambda folder: nullcontext())
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(shuffling._Shuffle, "write_chunks", fail)
        prepare.main(["mine"])
    monkeypatch.undo()
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match="was started with seed=42"):
        prepare.main(["mine", "--seed", "1"])
    assert (here / "data/mine_shuffled.unfinished/progress.json").exists()
    prepare.main(["mine"])
    assert manifest()["documents"] == 60


def test_an_earlier_result_is_not_overwritten(here, capsys):
    source = write_lines(here / "mine.jsonl", 30)
    prepare.main(["mine.jsonl"])
    before = files("data")
    prepare.main(["mine.jsonl"])
    assert "complete" in capsys.readouterr().out
    for options in (["--seed", "1"], ["--nchunks", "2"], ["--text_field", "text"]):
        with pytest.raises(UserError, match=f"was made with {options[0][2:]}=.*move it away"):
            prepare.main(["mine.jsonl", *options])
    content = source.read_text().replace("text 3", "TEXT 3")  # of the same size
    source.write_text(content)
    os.utime(source, (time.time() + 9,) * 2)
    with pytest.raises(UserError, match="made from other source files"):
        prepare.main(["mine.jsonl"])
    assert files("data") == before
    (here / "theirs").mkdir()
    prepare.main(["mine.jsonl", "--out", "theirs"])
    (here / "theirs/manifest.json").unlink()
    with pytest.raises(UserError, match="theirs exists and has no manifest.json"):
        prepare.main(["mine.jsonl", "--out", "theirs"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["none"], "none: no such file or folder"),
        (["empty"], "empty has no file that ends in"),
        (["a.pdf"], "a.pdf: unknown format"),
        (["a.jsonl"], "a.jsonl:1: .*found: 'body'.*--text_field"),
        (["a.jsonl", "--text_field", "x"], "a.jsonl:1: .*\"x\" .*'body'"),
        (["blank.txt"], "no document with text"),
        (["a.jsonl", "--memory", "0"], "--memory=0.0"),
        (["a.jsonl", "--nchunks", "0"], "--nchunks 0"),
        (["a.jsonl", "--validation_documents", "-1"], "--validation_documents -1"),
        (["a.jsonl", "--train_tokenizer", "200"], "--train_tokenizer must be 258"),
        (["a.jsonl", "--text_field", "body", "--validation_documents", "9"], "9 documents"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(here, argv, message):
    (here / "empty").mkdir()
    (here / "a.pdf").write_text("x")
    (here / "blank.txt").write_text("")
    write_lines(here / "a.jsonl", 9, "body")
    with pytest.raises(UserError, match=message) as caught:
        prepare.main(argv)
    assert "\n" not in str(caught.value)
    assert not list(here.glob("data/*"))
