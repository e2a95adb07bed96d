"""Files of documents: what is read as text, and names that are no readable files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lingua.dataloader.jsonl import document_text, parse_line
from lingua.errors import UserError
from lingua.prepare.readers import check_document_file, read_documents
from lingua.prepare.shuffle import ShufflePlan, shuffle_documents
from lingua.prepare.sources import describe_skipped, find_document_files

ROWS = [
    {"text": "text", "content": "content"},
    {"text": None, "content": "content"},
    {"text": None, "content": None},
    {"text": "", "content": "content"},
]
READ = ["text", "content", "", ""]


def test_lines_have_the_text_that_training_reads(tmp_path):
    rows = [*ROWS, {"content": "content"}, {"content": "content", "text": None}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    texts = [document["text"] for document in read_documents(tmp_path / "a.jsonl")]
    assert texts == [*READ, "content", "content"]
    for line, text in zip(lines, texts, strict=True):
        if line != lines[2]:  # training refuses a line without any text
            assert document_text(parse_line(line.encode(), "a.jsonl", 1)) == text


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_a_null_in_a_parquet_file_is_replaced_by_the_content(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    text, content = ([row[key] for row in ROWS] for key in ("text", "content"))
    string = getattr(pyarrow, kind)()
    columns = {"text": pyarrow.array(text, string), "content": pyarrow.array(content, string)}
    for table, expected in (
        (columns, READ),
        (columns | {"text": pyarrow.nulls(4)}, ["content", "content", "", "content"]),
        (columns | {"content": pyarrow.array([[1]] * 4)}, ["text", "", "", ""]),
    ):
        parquet.write_table(pyarrow.table(table), file)
        check_document_file(file)
        assert [document["text"] for document in read_documents(file)] == expected


@pytest.mark.parametrize("lines", ["\ufeff{}\n", "\ufeff\n{}\n", "\ufeff{0}\n\ufeff{0}\n"])
def test_a_byte_order_mark_is_ignored(tmp_path, lines):
    lines = lines.format('{"text": "\ufeffkept"}')
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    texts = [document["text"] for document in read_documents(tmp_path / "a.jsonl")]
    assert texts == ["\ufeffkept"] * lines.count("kept")


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda path: path.symlink_to("/not/there"), "a link to /not/there.*No such file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (os.mkfifo, "is a pipe"),
        (Path.touch, "is empty"),
    ],
    ids=["dangling link", "circle", "pipe", "empty"],
)
@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.parquet", "b.arrow", "b.md"])
def test_a_name_that_cannot_be_read_is_refused(tmp_path, make, problem, name):
    if (make, name) == (Path.touch, "b.md"):
        pytest.skip("an empty text is skipped")
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_text('{"text": "x"}\n' * 9)
    make(source / name)
    plan = ShufflePlan("x", seed=1, n_chunks=1, n_validation=1, memory=10**6)
    with pytest.raises(UserError, match=f"{name}.*{problem}"):
        shuffle_documents(find_document_files(source), source, tmp_path / "out", plan)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    scandir = os.scandir

    def denied(path):
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"locked.*Permission denied"):
        find_document_files(tmp_path)


def test_folders_with_suffixes_are_searched_and_attribute_files_skipped(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "x.jsonl" / "part-0.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "._b.jsonl").write_bytes(b"\0\5\x16\7")
    assert find_document_files(tmp_path) == [tmp_path / "x.jsonl" / "part-0.jsonl"]
    assert "._b.jsonl" in str(describe_skipped(tmp_path))


def test_metadata_and_caches_hold_no_documents(tmp_path):
    names = ["state.json", "tokenizer.json", "manifest.json", "x.tokens.json", "README.md"]
    for name in [*names, "cache-1.arrow", "a.json", "b.arrow", "notes.md", "c.pdf"]:
        (tmp_path / name).write_text("[]")
    found = [file.name for file in find_document_files(tmp_path)]
    assert found == ["a.json", "b.arrow", "notes.md"]
    assert find_document_files(tmp_path / "README.md") == [tmp_path / "README.md"]
    with pytest.raises(UserError, match="c.pdf: unknown format.*.parquet"):
        find_document_files(tmp_path / "c.pdf")


def test_a_folder_without_documents_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        find_document_files(tmp_path / "none")
    (tmp_path / "x.pdf").write_text("x")
    with pytest.raises(UserError, match=r"no file that ends in \.txt"):
        find_document_files(tmp_path)


@pytest.mark.parametrize("names", [("a.md", "a.md.gz"), ("a.md.gz", "a.md.zst")])
def test_a_file_in_two_forms_is_refused(tmp_path, names):
    for name in (*names, "b.md", "a.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match="a.md is there 2 times"):
        find_document_files(tmp_path)


@pytest.mark.parametrize("out", ["out", "data/out", "."])
def test_the_output_folder_is_not_a_source(tmp_path, monkeypatch, out):
    """Also if it is given relative to another folder, and while it is unfinished."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    for folder in (Path(out, "made"), Path(out, "made.unfinished/piles")):
        folder.mkdir(parents=True)
        (folder / "x.jsonl").write_text('{"text": "x"}')
    for source in (tmp_path, Path(".")):
        assert [f.name for f in find_document_files(source, Path(out, "made"))] == ["a.txt"]
        assert describe_skipped(source, Path(out, "made")) is None
