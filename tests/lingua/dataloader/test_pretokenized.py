"""Pretokenized chunks give the same stream and states as reading and tokenizing lines."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from lingua.data import (
    build_dataloader_from_args,
    init_dataloader_state_from_args,
    validate_data_args,
)
from lingua.dataloader import packing, pretokenized
from lingua.dataloader.args import DataArgs
from lingua.dataloader.jsonl import loop_on_jsonl
from lingua.dataloader.pretokenized import TokenFiles
from lingua.dataloader.reshard import reshard_streams
from lingua.errors import UserError
from lingua.tokenizer import TokenizerArgs
from tests.lingua.dataloader.token_chunks import (
    code_files,
    data_args,
    replace_text,
    script,
    set_row,
    tokenize,
    touch,
    write,
    write_chunk,
)


@pytest.fixture
def args(tmp_path: Path) -> DataArgs:
    return data_args(tmp_path / "data")


@pytest.fixture
def made(args: DataArgs) -> DataArgs:
    """The same data, tokenized."""
    tokenize(args)
    return replace(args, pretokenized=True)


def batches_of(args: DataArgs, state, n: int) -> list[tuple[np.ndarray, dict]]:
    with build_dataloader_from_args(args, state) as batches:
        return [next(batches) for _ in range(n)]


def first_batches(args: DataArgs, rank=0, world_size=1, n=1):
    return batches_of(args, init_dataloader_state_from_args(args, rank, world_size), n)


def assert_same_stream(got, want) -> None:
    for (a, after_a), (b, after_b) in zip(got, want, strict=True):
        assert np.array_equal(a, b)
        assert after_a == after_b


@pytest.mark.parametrize("rank, world_size", [(0, 1), (0, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("add_bos", [True, False])
def test_stream_and_states_equal_those_of_lines(args, rank, world_size, add_bos):
    args = replace(args, add_bos=add_bos, doc_mask=add_bos)
    tokenize(args)
    want = first_batches(args, rank, world_size, 100)
    got = first_batches(replace(args, pretokenized=True), rank, world_size, 100)
    assert_same_stream(got, want)
    web = want[-1][1]["it_state"]["it_state"]["it_state"]["source_to_state"]["web"]
    assert web["current_iter"] > 0, "the test does not reach the end of a chunk"


def test_a_run_resumes_with_or_without_token_files(args, made):
    want = first_batches(args, 1, 2, 24)
    for n in (1, 2, 5, 12, 23):
        state = json.loads(json.dumps(want[n - 1][1]))  # as in a checkpoint
        assert_same_stream(batches_of(made, state, 24 - n), want[n:])
        assert_same_stream(batches_of(args, state, 24 - n), want[n:])


def test_resharding_reads_the_same(args, made):
    saved = [first_batches(args, rank, 2, 3)[-1][1] for rank in range(2)]
    state = reshard_streams(saved, 0, 1)
    assert_same_stream(batches_of(made, state, 9), batches_of(args, state, 9))


@pytest.mark.parametrize("is_made", [False, True])
def test_a_rank_whose_documents_have_no_token_ends(tmp_path, is_made, monkeypatch):
    monkeypatch.setattr(packing, "MAX_EMPTY", 300)
    texts = ["", "text"] * 20  # one of two ranks that share the chunk gets all empty ones
    chunk = tmp_path / "web" / "web.chunk.00.jsonl"
    chunk.parent.mkdir()
    chunk.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    bare = {"sources": {"web": 1.0}, "add_bos": False, "add_eos": False, "load_async": False}
    args = DataArgs(root_dir=str(tmp_path), seed=0, pretokenized=is_made, **bare)
    write(args, chunk)
    with pytest.raises(UserError, match="documents in a row have no text"):
        first_batches(args, 0, 2)


def test_a_worker_process_reads_the_same(args, made):
    state = init_dataloader_state_from_args(args, 0, 1)
    ahead = replace(made, load_async=True)
    assert_same_stream(batches_of(ahead, state, 4), batches_of(args, state, 4))


def test_only_incomplete_files_are_made_again(made, capsys):
    chunks = sorted(Path(made.root_dir or "").glob("*/*.jsonl"))
    before = {c: TokenFiles(c).facts.stat().st_mtime_ns for c in chunks}
    TokenFiles(chunks[1]).tokens.write_bytes(b"")
    capsys.readouterr()
    tokenize(made, "--workers", "2")
    printed = capsys.readouterr().out
    assert "4 chunks, 1 to tokenize" in printed
    assert re.search(r"tokens; 1 of 1 done, [\d,]+ tokens/s", printed)
    changed = [c for c in chunks if TokenFiles(c).facts.stat().st_mtime_ns != before[c]]
    assert changed == [chunks[1]]
    validate_data_args(made, 1)


def test_chunks_in_root_dir_are_tokenized_if_no_source_is_named(args):
    root = Path(args.root_dir, "code")
    script.main([f"data.root_dir={root}", "data.tokenizer.name=bytes"])
    alone = replace(args, root_dir=str(root), sources={})
    with_files = replace(alone, pretokenized=True)
    validate_data_args(with_files, 1)
    assert_same_stream(first_batches(with_files, n=5), first_batches(alone, n=5))


def be_killed(chunk, **_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(args, monkeypatch):
    monkeypatch.setattr(script, "tokenize_chunk", be_killed)
    with pytest.raises(UserError, match="--workers 2: a worker was killed"):
        tokenize(args, "--workers", "2")


def test_small_vocabularies_take_two_bytes_per_token(made):
    files = code_files(made)
    facts = json.loads(files.facts.read_text())
    assert facts["dtype"] == "uint16" and files.tokens.stat().st_size == 2 * facts["tokens"]
    assert facts["documents"] == 4


# ---- files that don't fit


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda files: files.facts.unlink(), "tokens.json cannot be read"),
        (lambda files: files.facts.write_text("{"), "tokens.json is damaged"),
        (lambda files: files.facts.write_text("{}"), "tokens.json is damaged"),
        (lambda files: files.index.write_bytes(b"12345678"), "index has another size"),
        (lambda files: files.tokens.unlink(), "tokens cannot be read"),
        (lambda files: files.tokens.write_bytes(b""), "tokens is empty"),
        (lambda files: move_away(files.index), "tokens.index .a link to gone. cannot be read"),
        (lambda files: write_chunk(files.chunk, ["other", "text"]), "made with chunk_bytes="),
        (lambda files: replace_text(files.chunk, "pass", "fail"), "the text has changed since"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_made_again(args, made, spoil, problem):
    spoil(code_files(args))
    with pytest.raises(UserError, match=f"^data.pretokenized=true: .*{problem}.*tokenize_data"):
        first_batches(made)
    tokenize(args)
    assert_same_stream(first_batches(made, n=9), first_batches(args, n=9))


def move_away(file: Path) -> None:
    file.unlink()
    file.symlink_to("gone")


def test_a_name_that_is_no_file_is_refused_without_waiting(args):
    files, made = code_files(args), replace(args, pretokenized=True, sources={"code": 1.0})
    write(args, files.chunk)
    for file in (files.facts, files.tokens, files.index):
        content = file.read_bytes()
        for make, remove in ((Path.mkdir, Path.rmdir), (os.mkfifo, Path.unlink)):
            file.unlink()
            make(file)
            with pytest.raises(UserError, match=f"{file.name} is a .*, not a file"):
                first_batches(made)
            if file != files.facts:
                facts = files.facts.read_bytes()
                with pytest.raises(UserError, match=f"{file.name} is a .*, not a file"):
                    write(args, files.chunk)
                files.facts.write_bytes(facts)
            remove(file)
            file.write_bytes(content)
    first_batches(made)


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the chunks that are hashed from now on."""
    names, file_sha256 = [], pretokenized.file_sha256
    monkeypatch.setattr(
        pretokenized, "file_sha256", lambda path: (names.append(path.name), file_sha256(path))[1]
    )
    return names


def test_a_start_hashes_nothing_if_sizes_and_mtimes_match(made, hashed):
    validate_data_args(made, 1)
    first_batches(made)
    assert hashed == []


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_together_hash_a_copied_folder_once(made, hashed, tmp_path, world_size):
    copy = shutil.copytree(made.root_dir or "", tmp_path / "copy", copy_function=shutil.copyfile)
    chunks = sorted(copy.glob("*/*.jsonl"))
    for chunk in chunks:
        touch(chunk)
    copied = replace(made, root_dir=str(copy))
    validate_data_args(copied, world_size)
    for rank in range(world_size):
        (got,), (want,) = (first_batches(a, rank, world_size) for a in (copied, made))
        assert np.array_equal(got[0], want[0])
    assert sorted(hashed) == [chunk.name for chunk in chunks]


def test_files_without_a_sha256_are_accepted_if_the_chunk_is_older(args, made):
    file = code_files(args)
    facts = json.loads(file.facts.read_text())
    del facts["chunk_sha256"], facts["chunk_mtime_ns"]
    facts["chunk_fingerprint"] = "0123"  # as commit ed19b1a wrote it
    file.facts.write_text(json.dumps(facts))
    assert_same_stream(first_batches(made, n=9), first_batches(args, n=9))
    now = file.facts.stat().st_mtime_ns + 10**9
    os.utime(file.chunk, ns=(now, now))
    with pytest.raises(UserError, match="data.pretokenized=true: .*older than the chunk"):
        validate_data_args(made, 1)


SPOILED_LATER: dict[str, tuple[Callable[[TokenFiles], object], str]] = {
    "tokens truncated": (lambda files: os.truncate(files.tokens, 60), "tokens is truncated"),
    "index truncated": (lambda files: os.truncate(files.index, 16), "index is truncated"),
    "tokens removed": (lambda files: files.tokens.unlink(), "tokens: cannot be read"),
    "facts removed": (lambda files: files.facts.unlink(), "json: cannot be read"),
    **{
        f"row {row} {column} is {value}": (
            lambda files, at=(row, column), value=value: set_row(files.index, at, value),
            "tokens.index is damaged .row [12].: delete it",
        )
        for row in (1, 2)
        for column in (0, 1)
        for value in (-1, 0, 2**62)
    },
}


@pytest.mark.parametrize("case", SPOILED_LATER)
def test_files_that_change_while_they_are_read_raise(made, case):
    spoil, problem = SPOILED_LATER[case]
    files = code_files(made)

    def documents():
        return loop_on_jsonl(str(files.chunk), 0, 1, 0, 0, read=pretokenized.read_tokens)

    want = [tokens.tolist() for tokens, _ in islice(documents(), 9)]
    reading = documents()
    next(reading)
    spoil(files)
    with pytest.raises(UserError, match=f"^data.pretokenized=true: .*{problem}.*tokenize_data"):
        for expected in want[1:]:
            assert next(reading)[0].tolist() == expected


def test_files_of_other_options_are_refused(made):
    with pytest.raises(UserError, match="made with add_bos=True, now it is False"):
        first_batches(replace(made, add_bos=False))


def test_files_of_other_special_tokens_are_refused(args, tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, "a"))
    model.save(str(tmp_path / "tokenizer.json"))
    args = replace(args, tokenizer=TokenizerArgs("hf", str(tmp_path)), pretokenized=True)
    tokenize(args, f"data.tokenizer.path={tmp_path}")
    validate_data_args(args, 1)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "</s>"}')
    with pytest.raises(UserError, match="made with specials=None"):
        validate_data_args(args, 1)


def test_a_saved_position_inside_a_line_is_refused(args, made):
    state = first_batches(args, n=2)[-1][1]
    share = state["it_state"]["it_state"]["it_state"]["source_to_state"]["code"]
    share["position"] = 3
    with pytest.raises(UserError, match="cannot resume the data"):
        batches_of(made, state, 1)


def test_a_position_after_another_ranks_line_is_refused(made):
    chunk = str(code_files(made).chunk)
    _, after_first = next(pretokenized.read_tokens(chunk, 0, 2, 0, 0))
    with pytest.raises(UserError, match="has no line of this rank that ends at byte"):
        next(pretokenized.read_tokens(**{**after_first, "offset": 1}))


def test_a_chunk_without_a_token_is_refused(args):
    write_chunk(Path(args.root_dir or "") / "web" / "web.chunk.00.jsonl", ["", "", ""])
    with pytest.raises(UserError, match="no document with a token"):
        tokenize(args, "data.add_bos=false", "data.add_eos=false")


@pytest.mark.parametrize(
    "argv, message",
    [(["--workers", "0"], "--workers 0"), (["data.rot_dir=x"], "data.rot_dir"), ([], "root_dir")],
)
def test_wrong_options_are_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        script.main(argv)
