"""The local corpus has only prose, no repeats, and the same bytes on every run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lingua.errors import UserError
from lingua.prepare.tokenizer import SPECIAL_TOKENS
from tests.setup_scripts import SETUP, load_script

SENTENCE = (
    "The {} is read from the file that was given, and it is then kept for the other {} users."
)


prepare = load_script("prepare_local_data")


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """A library of 40 modules of different length, and files that must be skipped."""
    root = tmp_path / "lib"
    (root / "test").mkdir(parents=True)
    for i in range(40):
        # different words in each sentence, or it would be a repeat
        words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}{chr(97 + j)}" for j in range(4 + i % 7)]
        text = "\n\n".join(
            f"Of {w} and {w}s: this {w} is what the {w} of {w} will be when it has {w}ed."
            for w in words
        )
        (root / f"m{i:02d}.py").write_text(f'"""{text}"""\nraise RuntimeError("imported")\n')
    (root / "test" / "hidden.py").write_text(f'"""{SENTENCE.format("hidden", "hidden") * 5}"""')
    (root / "latin.py").write_bytes(b"# coding: latin-1\n# caf\xe9\n")
    (root / "broken.py").write_text("def :\n")
    return root


def run(out: Path, stdlib: Path, *argv: str) -> dict[str, bytes]:
    prepare.main(["--out", str(out), "--vocab-size", "300", *argv], stdlib)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def documents(files: dict[str, bytes], part: str) -> list[dict[str, str]]:
    names = sorted(name for name in files if part in name)
    return [json.loads(line) for name in names for line in files[name].decode().splitlines()]


MODULE = '''
"""The first of them is what the file has on its first line, and it is not code.

    >>> help(name)
    This is what is shown to the user by the example that is in the doctest.

The second of them is wrapped in the file, as most of the text is, and it is
put together again in one line.

- The third of them is an item of the list that is in the text.
- The fourth of them is the next item, and it is wrapped as well, so it is
  put together too.
"""
# The fifth of them is a comment that is longer than a line of the file
# and it is put together as well.
TEXT = """
# This is not a comment but a line of the string that is in the file.
"""

def f():
    """The sixth of them is the text of the function that is in the file."""
    x = 1  # This is behind the code and so it is not one of them, as it is short.
    # The seventh of them is a comment that is in the function.
'''


def test_module_text_is_docstrings_and_comments_in_order(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(MODULE)
    kept = prepare.module_passages(path)
    order = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh"]
    assert [passage.removeprefix("- ").split()[1] for passage in kept] == order
    assert all("\n" not in passage and "  " not in passage for passage in kept)


def test_topics_are_read_without_importing(tmp_path):
    path = tmp_path / "topics.py"
    text = f"Title\n*****\n\n{SENTENCE.format('topic', 'topic')}\n\n   x = code(y)\n"
    path.write_text(f"topics = {{'b': {text!r}, 'a': {text!r}}}\nraise RuntimeError\n")
    want = [SENTENCE.format("topic", "topic")]
    assert prepare.topic_passages(path) == {"a": want, "b": want}
    assert prepare.topic_passages(tmp_path / "absent.py") == {}


COLOURS = ["red", "green", "blue", "black", "white"]


def test_passages_that_nearly_repeat_are_kept_once(tmp_path):
    long = " ".join(f"this is the {w} of them" for w in COLOURS) + "."
    for name, text in {"a": long, "b": long.replace("black", "brown"), "c": long}.items():
        own = SENTENCE.format(name, name) + f" What {name} is for and what it does is in {name}."
        (tmp_path / f"{name}.py").write_text(f'"""{text}\n\n{own * 3}"""')
    kept = prepare.collect_documents(tmp_path)
    assert [document["source"] for document in kept] == ["module:a", "module:b", "module:c"]
    assert ["green of them" in document["text"] for document in kept] == [True, False, False]


@pytest.mark.parametrize("nchunks", range(1, 9))
def test_every_document_is_in_one_file(tmp_path, stdlib, nchunks):
    files = run(tmp_path / "out", stdlib, "--nchunks", str(nchunks))
    chunks = sorted(name for name in files if ".chunk." in name)
    assert chunks == [f"stdlib.chunk.{i:02d}.jsonl" for i in range(nchunks)]

    train, val = documents(files, ".chunk."), documents(files, ".val.")
    sources = [document["source"] for document in train + val]
    assert sorted(sources) == [f"module:m{i:02d}" for i in range(40)]
    assert val and not any("hidden" in document["text"] for document in train + val)

    sizes = [sum(len(d["text"]) for d in documents(files, name)) for name in chunks]
    assert max(sizes) - min(sizes) <= max(len(document["text"]) for document in train)


def test_the_split_does_not_depend_on_the_number_of_chunks(tmp_path, stdlib):
    one = run(tmp_path / "one", stdlib, "--nchunks", "1")
    many = run(tmp_path / "many", stdlib, "--nchunks", "5")
    assert one["stdlib.val.jsonl"] == many["stdlib.val.jsonl"]
    assert one["tokenizer.json"] == many["tokenizer.json"]


def test_a_second_run_does_nothing_and_another_folder_has_the_same_bytes(
    tmp_path, stdlib, monkeypatch, capsys
):
    first = run(tmp_path / "a", stdlib)
    assert run(tmp_path / "b", stdlib) == first

    monkeypatch.setattr(prepare, "collect_documents", None)  # fails if called
    capsys.readouterr()
    assert run(tmp_path / "a", stdlib) == first
    assert "complete" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["stdlib.chunk.01.jsonl", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_a_damaged_folder_is_rebuilt(tmp_path, stdlib, name, damage):
    out = tmp_path / "out"
    want = run(out, stdlib)
    if damage == "removed":
        (out / name).unlink()
    else:
        (out / name).write_bytes(want[name][:50])
    assert run(out, stdlib) == want


def test_fewer_chunks_remove_old_chunks_but_no_other_file(tmp_path, stdlib):
    out = tmp_path / "out"
    run(out, stdlib, "--nchunks", "6")
    (out / "mine.chunk.00.jsonl").write_text("{}\n")
    files = run(out, stdlib, "--nchunks", "2")
    chunks = sorted(name for name in files if ".chunk." in name)
    assert chunks == ["mine.chunk.00.jsonl", "stdlib.chunk.00.jsonl", "stdlib.chunk.01.jsonl"]


def test_a_corpus_of_another_program_is_refused(tmp_path, stdlib):
    out = tmp_path / "out"
    out.mkdir()
    (out / "fineweb.chunk.00.jsonl").write_text('{"text": "a"}\n')
    manifest = {"request": {"seed": 42}, "files": {"fineweb.chunk.00.jsonl": {"bytes": 14}}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"--out {out}: "):
        run(out, stdlib)
    assert {path.name for path in out.iterdir()} == {"fineweb.chunk.00.jsonl", "manifest.json"}


def test_the_tokenizer_decodes_any_text(tmp_path, stdlib):
    tokenizers = pytest.importorskip("tokenizers")
    run(tmp_path / "out", stdlib)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1]
    for text in ["The name  of it.\n\tNext", "Grüße, 世界 🙂", "", "\x00\x7f"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--nchunks", "0"], "--nchunks must be 1 to 100, got 0"),
        (["--nchunks", "41"], "found prose for 40 documents"),
        (["--vocab-size", "100"], "--vocab-size must be 258 (the bytes) to 100000"),
        (["--vocab-size", "1000000000"], "--vocab-size must be 258 (the bytes) to 100000"),
        (["--name", "a/b"], "--name must be letters"),
    ],
)
def test_impossible_options_are_refused(tmp_path, stdlib, argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        prepare.main(["--out", str(tmp_path / "out"), *argv], stdlib)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_created_is_named(tmp_path, stdlib):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=f"^--out {tmp_path / 'out'}: "):
        prepare.main(["--out", str(tmp_path / "out"), "--vocab-size", "300"], stdlib)


def test_a_mistake_is_one_line():
    script = str(SETUP / "prepare_local_data.py")
    for argv in (["--nchunks", "0"], ["--nonsense"]):
        done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1


def test_this_python_has_enough_english(tmp_path):
    """The real library gives about 2 MB, and no validation text in the training files."""
    out = tmp_path / "local"
    prepare.main(["--out", str(out), "--vocab-size", "300"])
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    train, val = documents(files, ".chunk."), documents(files, ".val.")
    text = "\n".join(document["text"] for document in train)
    assert 1.2e6 < len(text) < 4e6
    assert 0.03 < sum(len(document["text"]) for document in val) / len(text) < 0.1

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + 12]) for i in range(len(words) - 11)}

    held_out = set().union(*(runs(document["text"]) for document in val))
    assert len(held_out & runs(text)) < 0.02 * len(held_out)
