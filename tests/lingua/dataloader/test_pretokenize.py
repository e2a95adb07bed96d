"""Token files are made whole or gone on with, whatever ends the making."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lingua.data import validate_data_args
from lingua.dataloader import pretokenized as token_files
from lingua.dataloader.args import DataArgs
from lingua.dataloader.pretokenized import TokenFiles
from lingua.errors import UserError
from tests.lingua.dataloader.token_chunks import (
    code_files,
    data_args,
    recipe_of,
    replace_text,
    set_row,
    write,
)


@pytest.fixture
def args(tmp_path: Path) -> DataArgs:
    return data_args(tmp_path)


def files_beside(chunk: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in chunk.parent.glob(f"{chunk.stem}.*")}


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except UserError:
            code = 7
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_anywhere_the_next_run_ends_with_the_same_files(args, monkeypatch):
    monkeypatch.setattr(token_files, "COMMIT_BYTES", 200)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill loses nothing that was written
    chunk = Path(args.root_dir or "") / "web/web.chunk.01.jsonl"
    write(replace(args, add_bos=False), chunk)
    other = files_beside(chunk)
    write(args, chunk)
    want = files_beside(chunk)

    def killed(n: int) -> None:
        """The process ends at the n-th document, wait for the disk or rename."""
        left = n

        def counted(function):
            def call(*arguments, **options):
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        writer = token_files._TokenWriter
        for owner, name in ((writer, "add"), (os, "fsync"), (os, "replace"), (Path, "unlink")):
            setattr(owner, name, counted(getattr(owner, name)))
        write(args, chunk)

    n_killed = 0
    for n in range(1, 100, 3):
        for name, content in other.items():  # made with another recipe
            (chunk.parent / name).write_bytes(content)
        code = in_child(lambda n=n: killed(n))
        assert code in (0, 9)
        n_killed += code == 9
        assert in_child(lambda: write(args, chunk)) == 0
        assert {k: v for k, v in files_beside(chunk).items() if k in want} == want
        assert not TokenFiles(chunk).begun.exists()
    assert 10 < n_killed < 33


def encode_until(monkeypatch, n: int) -> list[dict]:
    """The documents that are encoded from now on; the n-th is a mistake."""
    encoded = []

    def document_text(document):
        encoded.append(document)
        if len(encoded) == n:
            raise UserError("stopped")
        return document["text"]

    monkeypatch.setattr(token_files, "document_text", document_text)
    return encoded


def test_what_was_done_is_not_done_again(args, monkeypatch):
    monkeypatch.setattr(token_files, "COMMIT_BYTES", 100)
    chunk = Path(args.root_dir or "") / "web/web.chunk.01.jsonl"
    encode_until(monkeypatch, 21)
    with pytest.raises(UserError, match="stopped"):
        write(args, chunk)
    encoded = encode_until(monkeypatch, 0)
    write(args, chunk)
    assert 0 < len(encoded) < 10  # of 21 documents
    validate_data_args(replace(args, sources={"web": 1.0}), 1)


def test_a_text_that_was_replaced_half_way_is_begun_anew(args, monkeypatch):
    monkeypatch.setattr(token_files, "COMMIT_BYTES", 100)
    chunk = Path(args.root_dir or "") / "web/web.chunk.01.jsonl"
    encode_until(monkeypatch, 21)
    with pytest.raises(UserError, match="stopped"):
        write(args, chunk)
    replace_text(chunk, "1/", "7/")  # of the same length
    encoded = encode_until(monkeypatch, 0)
    write(args, chunk)
    assert len(encoded) == 21


def test_a_text_that_is_replaced_while_it_is_read_is_told_of(args, monkeypatch):
    chunk = Path(args.root_dir or "") / "web/web.chunk.01.jsonl"
    commit = token_files._TokenWriter.commit
    change = lambda writer: (commit(writer), replace_text(chunk, "1/", "7/"))  # noqa: E731
    monkeypatch.setattr(token_files._TokenWriter, "commit", change)
    with pytest.raises(UserError, match="web.chunk.01.jsonl changed while it was read; run the"):
        write(args, chunk)
    assert TokenFiles(chunk).find_problem(recipe_of(args)) == "web.chunk.01.tokens.json is missing"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda files: os.truncate(files.tokens, files.tokens.stat().st_size - 2),
        lambda files: set_row(files.index, (-1, 0), 2**62),
        lambda files: set_row(files.index, (-1, 0), -1),
        lambda files: set_row(files.index, (-1, 1), -1),
    ],
)
def test_an_index_that_tells_of_what_is_not_there_is_not_gone_on_with(args, spoil):
    files = code_files(args)
    write(args, files.chunk)
    want = files_beside(files.chunk)
    files.facts.unlink()
    files.begun.write_text(json.dumps(files.made_with(recipe_of(args))))
    spoil(files)
    write(args, files.chunk)
    assert files_beside(files.chunk) == want


def test_two_processes_do_not_write_one_file(args, monkeypatch):
    chunk = Path(args.root_dir or "") / "web/web.chunk.01.jsonl"
    codes = []
    commit = token_files._TokenWriter.commit

    def second(writer):
        codes.append(in_child(lambda: write(args, chunk)))
        commit(writer)

    monkeypatch.setattr(token_files._TokenWriter, "commit", second)
    write(args, chunk)
    assert codes == [7]
