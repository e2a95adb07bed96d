"""Chunks tokenized ahead of time give the stream and the states of reading and tokenizing lines."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import fields, replace
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
from lingua.dataloader import pretokenized as token_files
from lingua.dataloader.args import DataArgs
from lingua.dataloader.jsonl import loop_on_jsonl
from lingua.dataloader.pretokenized import TokenFiles, TokenRecipe, write_token_files
from lingua.dataloader.reshard import reshard_streams
from lingua.errors import UserError
from lingua.tokenizer import TokenizerArgs, build_tokenizer
from tests.lingua.dataloader.token_chunks import (
    code_files,
    data_args,
    recipe_of,
    replace_text,
    script,
    set_row,
    tokenize,
    write,
    write_chunk,
)


@pytest.fixture
def args(tmp_path: Path) -> DataArgs:
    return data_args(tmp_path)


def batches_of(args: DataArgs, state, n: int) -> list[tuple[np.ndarray, dict]]:
    with build_dataloader_from_args(args, state) as batches:
        return [next(batches) for _ in range(n)]


def assert_same_stream(got, want) -> None:
    for (a, after_a), (b, after_b) in zip(got, want, strict=True):
        assert np.array_equal(a, b)
        assert after_a == after_b, "the states are those of reading lines"


@pytest.mark.parametrize("rank, world_size", [(0, 1), (0, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("add_bos", [True, False])
def test_stream_and_states_are_those_of_lines(args, rank, world_size, add_bos):
    args = replace(args, add_bos=add_bos, doc_mask=add_bos)
    tokenize(args)
    state = init_dataloader_state_from_args(args, rank, world_size)
    want = batches_of(args, state, 100)
    got = batches_of(replace(args, pretokenized=True), state, 100)
    assert_same_stream(got, want)
    web = want[-1][1]["it_state"]["it_state"]["it_state"]["source_to_state"]["web"]
    assert web["current_iter"] > 0, "the test does not reach the end of a chunk"


def test_a_run_goes_on_with_or_without_the_files(args):
    tokenize(args)
    ahead = replace(args, pretokenized=True)
    want = batches_of(args, init_dataloader_state_from_args(args, 1, 2), 24)
    for n in (1, 2, 5, 12, 23):
        state = json.loads(json.dumps(want[n - 1][1]))  # as a checkpoint holds it
        assert_same_stream(batches_of(ahead, state, 24 - n), want[n:])
        assert_same_stream(batches_of(args, state, 24 - n), want[n:])


def test_another_number_of_ranks_reads_the_same(args):
    tokenize(args)
    saved = [
        batches_of(args, init_dataloader_state_from_args(args, rank, 2), 3)[-1][1]
        for rank in range(2)
    ]
    state = reshard_streams(saved, 0, 1)
    assert_same_stream(
        batches_of(replace(args, pretokenized=True), state, 9), batches_of(args, state, 9)
    )


@pytest.mark.parametrize("pretokenized", [False, True])
def test_a_rank_whose_documents_have_no_token_ends(tmp_path, pretokenized):
    texts = ["", "text"] * 20  # of two ranks that share the chunk, one gets all the empty ones
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "web.chunk.00.jsonl").write_text(lines)
    bare = {"sources": {"web": 1.0}, "add_bos": False, "add_eos": False, "load_async": False}
    args = DataArgs(root_dir=str(tmp_path), seed=0, pretokenized=pretokenized, **bare)
    tokenizer = args.tokenizer
    recipe = TokenRecipe.of(tokenizer.name, tokenizer.path, args.add_bos, args.add_eos)
    write_token_files(tmp_path / "web" / "web.chunk.00.jsonl", build_tokenizer("bytes"), recipe)
    state = init_dataloader_state_from_args(args, 0, 2)
    with pytest.raises(UserError, match="documents in a row have no text"):
        batches_of(args, state, 1)


def test_a_process_of_its_own_reads_the_same(args):
    tokenize(args)
    state = init_dataloader_state_from_args(args, 0, 1)
    ahead = replace(args, pretokenized=True, load_async=True)
    assert_same_stream(batches_of(ahead, state, 4), batches_of(args, state, 4))


def test_files_that_are_right_are_left_alone_and_others_made_anew(args, capsys):
    tokenize(args)
    chunks = sorted(Path(args.root_dir or "").glob("*/*.jsonl"))
    before = {c: TokenFiles(c).facts.stat().st_mtime_ns for c in chunks}
    TokenFiles(chunks[1]).tokens.write_bytes(b"")
    capsys.readouterr()
    tokenize(args, "--workers", "2")
    said = capsys.readouterr().out
    assert "4 chunks, 1 to tokenize" in said
    assert re.search(r"tokens; 1 of 1 done, [\d,]+ tokens/s, all workers together", said)
    changed = [c for c in chunks if TokenFiles(c).facts.stat().st_mtime_ns != before[c]]
    assert changed == [chunks[1]]
    validate_data_args(replace(args, pretokenized=True), 1)


def be_killed(chunk, **_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_told_in_one_line(args, monkeypatch):
    monkeypatch.setattr(script, "tokenize_chunk", be_killed)
    with pytest.raises(UserError, match="--workers 2: one of them was killed.*goes on"):
        tokenize(args, "--workers", "2")


def test_small_vocabularies_take_two_bytes_a_token(args):
    tokenize(args)
    files = code_files(args)
    facts = json.loads(files.facts.read_text())
    assert facts["dtype"] == "uint16" and files.tokens.stat().st_size == 2 * facts["tokens"]
    assert facts["documents"] == 4


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda files, args: files.facts.unlink(), "tokens.json is missing"),
        (lambda files, args: files.facts.write_text("{"), "tokens.json is damaged"),
        (lambda files, args: files.facts.write_text("[]"), "tokens.json is damaged"),
        (lambda files, args: files.facts.write_text("[" * 10**5), "tokens.json is damaged"),
        (lambda files, args: files.facts.write_bytes(b"\xff"), "tokens.json is damaged"),
        (lambda files, args: files.index.write_bytes(b"12345678"), "index is missing or cut off"),
        (lambda files, args: fill(files.index), "index is damaged .its last row"),
        (
            lambda files, args: write_chunk(files.chunk, ["other", "text", "now", "here"]),
            "tokens.json: made with chunk_bytes=",
        ),
        (
            lambda files, args: replace_text(files.chunk, "pass", "fail"),
            "code.chunk.00.jsonl: the text has changed since",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_before_any_work_and_made_anew(args, spoil, problem):
    tokenize(args)
    spoil(code_files(args), args)
    assert_refused_and_made_anew(args, problem)


def assert_refused_and_made_anew(args: DataArgs, problem: str) -> None:
    ahead = replace(args, pretokenized=True)
    with pytest.raises(UserError, match=f"^data.pretokenized=true: .*{problem}.*tokenize_data"):
        validate_data_args(ahead, 1)
    tokenize(args)
    state = init_dataloader_state_from_args(args, 0, 1)
    assert_same_stream(batches_of(ahead, state, 9), batches_of(args, state, 9))


def fill(file: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


KEYS_OF_FACTS = [
    *(f.name for f in fields(TokenRecipe)),
    *("chunk_bytes", "chunk_fingerprint", "documents", "tokens", "dtype", "token_bytes"),
]


@pytest.mark.parametrize("value", [None, "x", [3], {}, 10**30, -1, True, 0.5, "gone"])
def test_facts_that_are_damaged_anywhere_are_a_problem_that_names_their_file(args, value):
    files, recipe = code_files(args), recipe_of(args)
    write(args, files.chunk)
    facts = json.loads(files.facts.read_text())
    assert set(facts) == set(KEYS_OF_FACTS) and files.find_problem(recipe) is None
    for key in KEYS_OF_FACTS:
        changed = {k: v for k, v in facts.items() if k != key}
        if value != "gone":
            changed[key] = value
        if changed != facts:
            files.facts.write_text(json.dumps(changed))
            told = files.find_problem(recipe) or "nothing"
            # a number of documents that could be is held to the file of that many rows
            is_size = (key, value) == ("documents", 10**30)
            assert ("tokens.index is missing or cut off" if is_size else files.facts.name) in told


def test_files_of_before_chunks_had_fingerprints_are_refused(args):
    tokenize(args)
    file = code_files(args).facts
    facts = json.loads(file.read_text())
    del facts["chunk_fingerprint"]
    file.write_text(json.dumps(facts))
    assert_refused_and_made_anew(args, "older version.*pretokenized=false reads the text")


def test_a_file_that_may_not_be_read_is_one_line(args):
    tokenize(args)
    code_files(args).facts.unlink()
    code_files(args).facts.mkdir()
    with pytest.raises(UserError, match="tokens.json cannot be read .Is a directory.*tokenize_dat"):
        validate_data_args(replace(args, pretokenized=True), 1)


SPOILED_LATER: dict[str, tuple[Callable[[TokenFiles], object], str]] = {
    # within the page that is mapped, which reads as zeros behind the end; and a page away, SIGBUS
    "tokens cut": (lambda files: os.truncate(files.tokens, 60), "tokens was cut off"),
    "no tokens": (lambda files: os.truncate(files.tokens, 0), "tokens was cut off"),
    "index cut": (lambda files: os.truncate(files.index, 16), "index was cut off"),
    "tokens removed": (lambda files: files.tokens.unlink(), "tokens cannot be read .No such file"),
    "index removed": (lambda files: files.index.unlink(), "index cannot be read .No such file"),
    "facts cut": (lambda files: os.truncate(files.facts, 10), "json is damaged"),
    "facts removed": (lambda files: files.facts.unlink(), "json is missing"),
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
def test_files_that_are_spoiled_while_they_are_read_are_told_of(args, case):
    tokenize(args)
    spoil, told = SPOILED_LATER[case]
    files = code_files(args)

    def documents():
        return loop_on_jsonl(str(files.chunk), 0, 1, 0, 0, read=token_files.read_tokens)

    want = [tokens.tolist() for tokens, _ in islice(documents(), 9)]
    reading = documents()
    next(reading)
    spoil(files)
    with pytest.raises(UserError, match=f"^data.pretokenized=true: .*{told}.*tokenize_data"):
        for expected in want[1:]:
            assert next(reading)[0].tolist() == expected


def test_files_of_other_options_are_refused(args):
    tokenize(args)
    other = replace(args, pretokenized=True, add_bos=False)
    with pytest.raises(UserError, match="made with add_bos=True, and it is False now"):
        build_dataloader_from_args(other, init_dataloader_state_from_args(other, 0, 1))


def test_files_of_other_special_tokens_are_refused(args, tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, "a"))
    model.save(str(tmp_path / "tokenizer.json"))
    args = replace(args, tokenizer=TokenizerArgs("hf", str(tmp_path)))
    tokenize(args, f"data.tokenizer.path={tmp_path}")
    validate_data_args(replace(args, pretokenized=True), 1)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "</s>"}')
    with pytest.raises(UserError, match="made with specials=None, and it is {'bos': '</s>'} now"):
        validate_data_args(replace(args, pretokenized=True), 1)


def test_a_chunk_that_changed_under_a_checkpoint_is_refused(args):
    tokenize(args)
    state = batches_of(args, init_dataloader_state_from_args(args, 0, 1), 2)[-1][1]
    share = state["it_state"]["it_state"]["it_state"]["source_to_state"]["code"]
    share["position"] = 3
    with pytest.raises(UserError, match="cannot resume the data"):
        batches_of(replace(args, pretokenized=True), state, 1)


def test_a_position_behind_another_ranks_line_is_refused(args):
    tokenize(args)
    chunk = str(Path(args.root_dir or "") / "code" / "code.chunk.00.jsonl")
    _, after_first = next(token_files.read_tokens(chunk, 0, 2, 0, 0))
    with pytest.raises(UserError, match="has no line of this rank that ends at byte"):
        next(token_files.read_tokens(**{**after_first, "offset": 1}))


def test_a_chunk_without_a_token_is_refused(args, tmp_path):
    write_chunk(tmp_path / "web" / "web.chunk.00.jsonl", ["", "", ""])
    with pytest.raises(UserError, match="no document with a token"):
        tokenize(args, "data.add_bos=false", "data.add_eos=false")


@pytest.mark.parametrize(
    "argv, message",
    [(["--workers", "0"], "--workers 0"), (["data.rot_dir=x"], "data.rot_dir"), ([], "root_dir")],
)
def test_wrong_options_are_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        script.main(argv)
