"""Token files are written completely, or resumed after any interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lingua.data import validate_data_args
from lingua.dataloader import pretokenized
from lingua.dataloader.args import DataArgs
from lingua.dataloader.pretokenized import TokenFiles, TokenRecipe
from lingua.errors import UserError
from tests.lingua.dataloader.token_chunks import (
    code_files,
    data_args,
    replace_text,
    set_row,
    write,
)


@pytest.fixture
def args(tmp_path: Path) -> DataArgs:
    return data_args(tmp_path)


@pytest.fixture
def chunk(args: DataArgs) -> Path:
    return Path(args.root_dir or "") / "web/web.chunk.01.jsonl"


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


def test_killed_anywhere_the_next_run_writes_the_same_files(args, chunk, monkeypatch):
    monkeypatch.setattr(pretokenized, "COMMIT_BYTES", 200)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill loses nothing that was written
    write(replace(args, add_bos=False), chunk)
    other = files_beside(chunk)
    write(args, chunk)
    want = files_beside(chunk)

    def killed(n: int) -> None:
        """End the process at the n-th document, fsync, rename or removal."""
        left = n

        def counted(function):
            def call(*arguments, **options):
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        writer = pretokenized._TokenWriter
        for owner, name in ((writer, "add"), (os, "fsync"), (os, "replace"), (Path, "unlink")):
            setattr(owner, name, counted(getattr(owner, name)))
        write(args, chunk)

    n_killed = 0
    for n in range(1, 100, 3):
        for name in other.keys() - {chunk.name}:  # made with another recipe
            (chunk.parent / name).write_bytes(other[name])
        code = in_child(lambda n=n: killed(n))
        assert code in (0, 9)
        n_killed += code == 9
        assert in_child(lambda: write(args, chunk)) == 0
        assert {k: v for k, v in files_beside(chunk).items() if k in want} == want
        assert not TokenFiles(chunk).unfinished.exists()
    assert 10 < n_killed < 33


def encode_until(monkeypatch, n: int) -> list[dict]:
    """Record the documents that are encoded from now on; raise at the n-th."""
    encoded = []

    def document_text(document):
        encoded.append(document)
        if len(encoded) == n:
            raise UserError("stopped")
        return document["text"]

    monkeypatch.setattr(pretokenized, "document_text", document_text)
    return encoded


@pytest.fixture
def half_written(args, chunk, monkeypatch):
    monkeypatch.setattr(pretokenized, "COMMIT_BYTES", 100)
    encode_until(monkeypatch, 21)
    with pytest.raises(UserError, match="stopped"):
        write(args, chunk)


def test_resume_skips_finished_documents(args, chunk, half_written, monkeypatch):
    encoded = encode_until(monkeypatch, 0)
    write(args, chunk)
    assert 0 < len(encoded) < 10  # of 21 documents
    validate_data_args(replace(args, sources={"web": 1.0}), 1)


def test_text_that_changed_half_way_is_tokenized_again(args, chunk, half_written, monkeypatch):
    replace_text(chunk, "1/", "7/")
    encoded = encode_until(monkeypatch, 0)
    write(args, chunk)
    assert len(encoded) == 21


def test_text_that_changes_while_it_is_read_is_refused(args, chunk, monkeypatch):
    commit = pretokenized._TokenWriter.commit
    change = lambda writer: (commit(writer), replace_text(chunk, "1/", "7/"))  # noqa: E731
    monkeypatch.setattr(pretokenized._TokenWriter, "commit", change)
    with pytest.raises(UserError, match=r"web.chunk.01.jsonl changed while it was read"):
        write(args, chunk)
    assert "tokens.json cannot be read" in (
        TokenFiles(chunk).find_problem(TokenRecipe.of(args)) or ""
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda files: os.truncate(files.tokens, files.tokens.stat().st_size - 2),
        lambda files: set_row(files.index, (-1, 0), 2**62),
        lambda files: set_row(files.index, (-1, 1), -1),
    ],
)
def test_an_index_beyond_its_files_is_not_resumed(args, spoil):
    files = code_files(args)
    write(args, files.chunk)
    want = files_beside(files.chunk)
    files.facts.unlink()
    files.unfinished.write_text(json.dumps(files.made_from(TokenRecipe.of(args))))
    spoil(files)
    write(args, files.chunk)
    assert files_beside(files.chunk) == want


def test_two_processes_do_not_write_the_same_files(args, chunk, monkeypatch):
    codes = []
    commit = pretokenized._TokenWriter.commit

    def second(writer):
        codes.append(in_child(lambda: write(args, chunk)))
        commit(writer)

    monkeypatch.setattr(pretokenized._TokenWriter, "commit", second)
    write(args, chunk)
    assert codes == [7]
