"""Ranks share lines: all ranks together read each line once per pass, for any numbers."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from lingua.dataloader.jsonl import (
    distribute_data_to_rank,
    document_text,
    find_and_sanitize_chunks,
    find_val_files,
    iter_val_documents,
    loop_on_jsonl,
    read_jsonl,
)
from lingua.errors import UserError


def write(path: Path, texts, key="text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: t}) + "\n" for t in texts), encoding="utf-8")
    return path


def make_chunks(folder: Path, n_chunks: int, n_lines: int) -> Path:
    for c in range(n_chunks):
        write(folder / f"x.chunk.{c:02d}.jsonl", [f"{c}/{line}" for line in range(n_lines)])
    return folder


def one_pass(folder, rank, world_size):
    """Return what a rank reads until it is back at its first line."""
    state = distribute_data_to_rank(str(folder), rank, world_size)
    texts = []
    for document, place in loop_on_jsonl(**state):
        if place["current_iter"] > 0:
            return texts
        texts.append(document_text(document))


@pytest.mark.parametrize("n_chunks", [1, 2, 3, 4, 6, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_every_line_is_read_once_a_pass(tmp_path, n_chunks, world_size):
    n_lines = 11
    folder = make_chunks(tmp_path, n_chunks, n_lines)
    per_rank = [one_pass(folder, rank, world_size) for rank in range(world_size)]
    read = Counter(text for texts in per_rank for text in texts)
    assert read == Counter(f"{c}/{line}" for c in range(n_chunks) for line in range(n_lines))
    # evenly: per shared chunk, ranks differ by one line at most
    lengths = [len(texts) for texts in per_rank]
    assert max(lengths) - min(lengths) <= n_chunks


def test_consecutive_ranks_share_a_chunk_if_chunks_divide_ranks(tmp_path):
    folder = make_chunks(tmp_path, 2, 8)
    states = [distribute_data_to_rank(str(folder), rank, 4) for rank in range(4)]
    places = [(Path(s["file_path"]).name, s["block_size"], s["offset"]) for s in states]
    assert places == [
        ("x.chunk.00.jsonl", 2, 0),
        ("x.chunk.00.jsonl", 2, 1),
        ("x.chunk.01.jsonl", 2, 0),
        ("x.chunk.01.jsonl", 2, 1),
    ]


def test_distribution_does_not_depend_on_directory_order(tmp_path, monkeypatch):
    folder = make_chunks(tmp_path, 5, 4)
    want = [distribute_data_to_rank(str(folder), rank, 2) for rank in range(2)]
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listdir(folder), reverse=True))
    assert [distribute_data_to_rank(str(folder), rank, 2) for rank in range(2)] == want


@pytest.mark.parametrize("n_chunks, world_size", [(1, 1), (1, 3), (3, 2), (5, 1)])
def test_reading_resumes_after_every_line(tmp_path, n_chunks, world_size):
    folder = make_chunks(tmp_path, n_chunks, 4)
    (folder / "x.chunk.00.jsonl").open("a").write('\n   \n{"content": "last, no newline"}')
    for rank in range(world_size):
        state = distribute_data_to_rank(str(folder), rank, world_size)
        whole = list(islice(loop_on_jsonl(**state), 30))
        for k, (_, saved) in enumerate(whole[:20]):
            saved = json.loads(json.dumps(saved))
            assert list(islice(loop_on_jsonl(**saved), 8)) == whole[k + 1 : k + 9]


def test_text_comes_before_content_and_blank_lines_do_not_count(tmp_path):
    file = tmp_path / "x.chunk.0.jsonl"
    file.write_text('\n{"text": "a", "content": "b"}\n \n{"content": "c"}\n\n', encoding="utf-8")
    documents = [d for d, _ in read_jsonl(str(file), 0, 1, 0, 0)]
    assert [document_text(d) for d in documents] == ["a", "c"]
    assert [document_text(d) for d, _ in read_jsonl(str(file), 0, 2, 1, 0)] == ["c"]


def test_a_null_text_counts_as_missing(tmp_path):
    file = tmp_path / "x.val.jsonl"
    file.write_text('{"text": null, "content": "c"}\n{"text": "", "content": "c"}\n')
    assert [document_text(d) for d, _ in read_jsonl(str(file), 0, 1, 0, 0)] == ["c", ""]
    assert list(iter_val_documents(str(tmp_path), [""])) == ["c", ""]


@pytest.mark.parametrize("lines", ["\ufeff{}\n", "\ufeff\n{}\n", "\ufeff{0}\n\ufeff{0}\n"])
def test_a_byte_order_mark_is_ignored(tmp_path, lines):
    """Positions still count its bytes, so that a saved position can be checked and resumed."""
    lines = lines.format('{"text": "\ufeffkept"}') * 2  # as in joined files
    file = tmp_path / "x.chunk.0.jsonl"
    file.write_text(lines, encoding="utf-8")
    n_documents = lines.count("kept")
    whole = list(islice(loop_on_jsonl(**distribute_data_to_rank(str(tmp_path), 0, 1)), 9))
    assert {document_text(document) for document, _ in whole} == {"\ufeffkept"}
    assert whole[n_documents - 1][1]["position"] == file.stat().st_size
    for k, (_, state) in enumerate(whole[:4]):
        assert list(islice(loop_on_jsonl(**state), 4)) == whole[k + 1 : k + 5]


def test_text_is_utf8_and_broken_surrogates_are_replaced(tmp_path):
    file = tmp_path / "x.chunk.0.jsonl"
    file.write_bytes('{"text": "é漢😀"}\n{"text": "a\\ud83d b \\ud83d\\ude00"}\n'.encode())
    texts = [document_text(d) for d, _ in read_jsonl(str(file), 0, 1, 0, 0)]
    assert texts == ["é漢😀", "a\ufffd b 😀"]


BAD_LINES = {
    b'{"text": "cut off': "not JSON",
    b'["a list"]': "must be a JSON object, got list",
    b'{"title": "x", "id": 1}': "found: 'id', 'title'",
    b'{"text": null}': "found: 'text' = null",
    b'{"text": null, "content": 3}': "found: 'content', 'text'",
    b'{"text": 3, "content": "x"}': "found: 'content', 'text'",
    b'{"text": "\xff\xfe"}': "not JSON in UTF-8",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, bad):
    file = write(tmp_path / "x.chunk.0.jsonl", ["one", "two"])
    state = distribute_data_to_rank(str(tmp_path), 0, 1)
    with file.open("ab") as f:
        f.write(b"\n" + bad + b'\n{"text": "five"}\n')
    with pytest.raises(UserError, match=rf"x\.chunk\.0\.jsonl:4: .*{BAD_LINES[bad]}"):
        distribute_data_to_rank(str(tmp_path), 0, 1)  # before a run
    stream = loop_on_jsonl(**state)
    _, saved = next(stream)
    next(stream)
    for at_fault in (stream, islice(loop_on_jsonl(**saved), 1, None)):  # also resumed
        with pytest.raises(UserError, match=rf"x\.chunk\.0\.jsonl:4: .*{BAD_LINES[bad]}") as caught:
            next(at_fault)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prepare, world_size, message",
    [
        (lambda folder: None, 1, "no folder .*source"),
        (lambda folder: folder.mkdir(), 1, r"no file named \*\.chunk\.\*\.jsonl.*scripts.prepare"),
        (lambda folder: folder.write_text("x"), 1, "no folder .*scripts.prepare"),
        (lambda f: write(f / "a.jsonl", ["x"]), 1, r"no file named \*\.chunk\.\*\.jsonl"),
        (lambda f: write(f / "a.chunk.0.jsonl", []), 1, r"a\.chunk\.0\.jsonl is empty"),
        (lambda f: write(f / "a.chunk.0.jsonl", ["x"]), 2, "has 1 lines but 2 ranks share it"),
        (lambda f: make_chunks(f, 3, 3), 4, "has 3 lines but 4 ranks share it"),
        (lambda f: write(f / "a.chunk.0.jsonl", ["x"], key="txt"), 1, r"jsonl:1: no string"),
    ],
)
def test_unreadable_chunks_are_refused_before_the_start(tmp_path, prepare, world_size, message):
    folder = tmp_path / "source"
    prepare(folder)
    with pytest.raises(UserError, match=message):
        find_and_sanitize_chunks(str(folder), world_size)


def link_in_a_circle(path: Path) -> None:
    path.symlink_to(path)


def hide_from_reader(path: Path) -> None:
    path.write_text('{"text": "x"}\n')
    path.chmod(0)


UNREADABLE = {
    "dangling link": (lambda path: path.symlink_to("/not/there"), "a link to /not/there.*No such"),
    "circle": (link_in_a_circle, "a link to .*cannot be read"),
    "folder": (Path.mkdir, "is a folder"),
    "linked folder": (lambda path: path.symlink_to("."), "is a folder"),
    "pipe": (os.mkfifo, "is a pipe"),
    "empty": (Path.touch, "is empty"),
    "only a byte order mark": (lambda path: path.write_bytes(b"\xef\xbb\xbf\n"), "is empty"),
    "no permission": (hide_from_reader, "Permission denied"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_matching_name_that_cannot_be_read_is_refused(tmp_path, kind, monkeypatch):
    make, problem = UNREADABLE[kind]
    if kind == "no permission":  # root may read everything
        monkeypatch.setattr(os, "access", lambda path, _: Path(path).stat().st_mode & 0o444)
    chunks, texts = make_chunks(tmp_path / "chunks", 2, 2), tmp_path / "texts"
    write(texts / "a.val.jsonl", ["x"])
    for path in (chunks / "x.chunk.02.jsonl", texts / "b.val.jsonl"):
        make(path)
    with pytest.raises(UserError, match=rf"x\.chunk\.02\.jsonl.*{problem}"):
        find_and_sanitize_chunks(str(chunks), 1)
    with pytest.raises(UserError, match=rf"b\.val\.jsonl.*{problem}"):
        find_val_files(str(tmp_path), ["texts"])


def test_a_link_to_a_readable_file_is_a_chunk(tmp_path):
    make_chunks(tmp_path / "elsewhere", 1, 2)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.chunk.00.jsonl").symlink_to("../elsewhere/x.chunk.00.jsonl")
    assert one_pass(tmp_path / "source", 0, 1) == ["0/0", "0/1"]
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(UserError, match="no folder .*link .a link to gone"):
        find_and_sanitize_chunks(str(tmp_path / "link"), 1)


def test_attribute_files_of_macos_are_skipped(tmp_path):
    make_chunks(tmp_path, 1, 2)
    write(tmp_path / "x.val.jsonl", ["held out"])
    for name in ("._x.chunk.00.jsonl", "._x.chunk.01.jsonl", "._x.val.jsonl"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert one_pass(tmp_path, 0, 1) == ["0/0", "0/1"]
    assert list(iter_val_documents(str(tmp_path), ["."])) == ["held out"]


def test_whole_chunks_may_be_short(tmp_path):
    make_chunks(tmp_path, 4, 1)
    assert len(find_and_sanitize_chunks(str(tmp_path), 4)) == 4


def test_a_chunk_that_is_removed_during_the_run_is_named(tmp_path):
    make_chunks(tmp_path / "a", n_chunks=1, n_lines=2)
    (chunk,) = (tmp_path / "a").glob("*.jsonl")
    lines = loop_on_jsonl(**distribute_data_to_rank(str(tmp_path / "a"), 0, 1))
    next(lines)
    chunk.unlink()
    with pytest.raises(UserError, match=rf"{chunk}: cannot be read \(No such file"):
        list(islice(lines, 9))


def test_a_chunk_emptied_during_the_run_does_not_spin(tmp_path):
    file = write(tmp_path / "x.chunk.0.jsonl", ["a"])
    stream = loop_on_jsonl(**distribute_data_to_rank(str(tmp_path), 0, 1))
    next(stream)
    file.write_text("")
    with pytest.raises(UserError, match="no line for this rank"):
        next(stream)


def test_ranks_take_validation_documents_round_robin(tmp_path):
    write(tmp_path / "a" / "b.val.jsonl", ["3", "4", "5"])
    write(tmp_path / "a" / "a.val.jsonl", ["0", "1", "2"])
    write(tmp_path / "b" / "x.val.jsonl", ["6"])
    write(tmp_path / "b" / "x.chunk.0.jsonl", ["training"])
    assert list(iter_val_documents(str(tmp_path), ["a", "b"])) == list("0123456")
    assert list(iter_val_documents(str(tmp_path), ["b", "a"])) == list("6012345")
    per_rank = [list(iter_val_documents(str(tmp_path), ["a", "b"], rank, 3)) for rank in range(3)]
    assert per_rank == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    assert [Path(f).name for f in find_val_files(str(tmp_path), ["a"])] == [
        "a.val.jsonl",
        "b.val.jsonl",
    ]


def test_validation_errors_name_the_pattern_or_the_line(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"no file named \*\.val\.jsonl"):
        iter_val_documents(str(tmp_path), ["a"])
    write(tmp_path / "a" / "x.val.jsonl", ["fine"], key="body")
    with pytest.raises(UserError, match=r"x\.val\.jsonl:1: "):
        list(iter_val_documents(str(tmp_path), ["a"]))


def test_a_file_that_shrinks_while_it_is_read_raises(tmp_path):
    path = write(tmp_path / "a.chunk.00.jsonl", ["one", "two"])
    path.write_text(path.read_text() + "{broken\n")
    documents = read_jsonl(str(path), 0, 1, 0, 0)
    next(documents)
    path.write_text("")  # the reader has buffered the next lines
    next(documents)
    with pytest.raises(UserError, match=r"a\.chunk\.00\.jsonl"):
        next(documents)
