"""Shuffling loses and repeats no document, and gives the same bytes after any interruption."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from lingua.errors import UserError
from lingua.prepare import shuffle as shuffling
from lingua.prepare.shuffle import ShufflePlan, shuffle_documents
from lingua.prepare.sources import find_document_files

N_DOCUMENTS = 400
N_CHUNKS, N_VALIDATION = 7, 20


def text_of(i: int) -> str:
    return f"document {i} " + "über " * (i % 11)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Every kind of file, in folders with blanks in their names, and documents without text."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "the sources"
    (folder / "a b").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "half.jsonl").write_text("not a document")
    parts = [list(range(N_DOCUMENTS))[i::4] for i in range(4)]
    table = {"id": [str(i) for i in parts[0]], "text": [text_of(i) for i in parts[0]]}
    table["id"].append("empty")
    table["text"].append(None)
    parquet.write_table(pyarrow.table(table), folder / "a b" / "000.parquet", row_group_size=30)

    def lines(part: list[int], key: str) -> bytes:
        rows = [json.dumps({key: text_of(i), "url": "x"}) for i in part]
        return "\n".join([*rows, "", json.dumps({"text": ""})]).encode()

    (folder / "plain.jsonl").write_bytes(lines(parts[1], "text"))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(parts[2], "content")))
    with pyarrow.output_stream(str(folder / "c.jsonl.zst"), compression="zstd") as file:
        file.write(lines(parts[3], "text"))
    return folder


def plan(**changes) -> ShufflePlan:
    options = {"name": "x", "seed": 1, "n_chunks": N_CHUNKS, "n_validation": N_VALIDATION}
    return ShufflePlan(**{**options, "memory": 4000, **changes})


def shuffle(root: Path, out: Path, **changes) -> dict:
    return shuffle_documents(find_document_files(root), root, out, plan(**changes), lambda _: None)


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def texts(files: dict[str, bytes], part: str) -> list[str]:
    names = [name for name in files if part in name]
    return [json.loads(line)["text"] for name in names for line in files[name].splitlines()]


def test_every_document_is_in_one_file(root, tmp_path):
    out = tmp_path / "out"
    manifest = shuffle(root, out)
    files = files_of(out)
    assert list(files) == [
        "manifest.json", *(f"x.chunk.{i:02d}.jsonl" for i in range(N_CHUNKS)), "x.val.jsonl",
    ]  # fmt: skip
    found = Counter(texts(files, ".jsonl"))
    assert found == Counter(text_of(i) for i in range(N_DOCUMENTS))
    assert len(texts(files, ".val.")) == N_VALIDATION
    sizes = {len(texts(files, f".chunk.{i:02d}")) for i in range(N_CHUNKS)}
    assert max(sizes) - min(sizes) <= 1
    assert manifest["documents"] == N_DOCUMENTS and manifest["without_text"] == 4
    for name, facts in manifest["files"].items():
        assert facts["sha256"] == hashlib.sha256(files[name]).hexdigest()
        assert facts["bytes"] == len(files[name])
        assert facts["documents"] == len(files[name].splitlines())
    assert json.loads(files["manifest.json"]) == manifest
    assert not (tmp_path / "out.unfinished").exists()


def test_zero_validation_documents_give_no_validation_file(root, tmp_path):
    out = tmp_path / "out"
    manifest = shuffle(root, out, n_validation=0)
    files = files_of(out)
    names = [f"x.chunk.{i:02d}.jsonl" for i in range(N_CHUNKS)]
    assert list(files) == ["manifest.json", *names] and list(manifest["files"]) == names
    found = Counter(texts(files, ".chunk."))
    assert found == Counter(text_of(i) for i in range(N_DOCUMENTS))
    for name, facts in manifest["files"].items():
        assert facts["documents"] == len(files[name].splitlines())
    assert shuffle(root, out, n_validation=0) == manifest
    with pytest.raises(UserError, match="made with validation_documents=0"):
        shuffle(root, out)


def test_only_the_text_and_the_id_are_kept(root, tmp_path):
    shuffle(root, tmp_path / "out")
    lines = b"".join(files_of(tmp_path / "out")[f"x.chunk.{i:02d}.jsonl"] for i in range(N_CHUNKS))
    keys = {tuple(sorted(json.loads(line))) for line in lines.splitlines()}
    assert keys == {("text",), ("id", "text")}


def test_order_is_a_fair_shuffle(root, tmp_path):
    """The order depends neither on the file nor on the position in it."""
    shuffle(root, tmp_path / "out", memory=10**9, n_chunks=1)
    order = [int(t.split()[1]) for t in texts(files_of(tmp_path / "out"), ".chunk.")]
    positions = {document: i for i, document in enumerate(order)}
    n = len(order)
    for group in ([d for d in order if d % 4 == 0], [d for d in order if d < N_DOCUMENTS // 4]):
        mean = sum(positions[d] for d in group) / len(group)
        # 4 standard deviations of the mean of as many positions, drawn without replacement
        bound = 4 * ((n * n / 12) / len(group) * (1 - len(group) / n)) ** 0.5
        assert abs(mean - (n - 1) / 2) < bound
    neighbours = sum(abs(a - b) == 4 for a, b in zip(order, order[1:], strict=False))
    assert neighbours < 12  # 2 to 3 are expected


def test_the_order_depends_on_the_seed(root, tmp_path):
    shuffle(root, tmp_path / "a")
    shuffle(root, tmp_path / "b", seed=2)
    a, b = (texts(files_of(tmp_path / x), ".val.") for x in "ab")
    assert len(set(a) & set(b)) < N_VALIDATION // 2


@pytest.mark.parametrize("held_out", [N_VALIDATION, 0])
def test_a_run_that_is_killed_repeatedly_ends_with_the_same_bytes(
    root, tmp_path, monkeypatch, held_out
):
    """SIGKILL-like: buffers are lost, and files may be longer than recorded."""
    monkeypatch.setattr(shuffling, "SAVE_EVERY", 0)
    shuffle(root, tmp_path / "undisturbed", n_validation=held_out)
    want = files_of(tmp_path / "undisturbed")
    rng = random.Random(0)
    out, n_killed = tmp_path / "out", 0
    while not out.exists():
        child = os.fork()
        if child == 0:
            code = 1  # also after an error: pytest must not continue in two processes
            try:
                _die_after(rng.randrange(1, 250) if n_killed < 25 else 10**9, monkeypatch)
                shuffle(root, out, n_validation=held_out)
                code = 0
            finally:
                os._exit(code)
        n_killed += os.waitpid(child, 0)[1] != 0
        rng.random()
        assert n_killed <= 25, "a run that is not killed does not end"
    assert n_killed > 5
    assert files_of(out) == want


def _die_after(n_events: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process at the n-th line, fsync, save or removal."""
    left = n_events

    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left <= 0:
                os._exit(1)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(shuffling._Appended, "write", counted(shuffling._Appended.write))
    monkeypatch.setattr(shuffling, "write_atomic", counted(shuffling.write_atomic))
    monkeypatch.setattr(shuffling.os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


def test_a_finished_folder_is_left_alone(root, tmp_path):
    out, logged = tmp_path / "out", []
    shuffle(root, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    shuffle_documents(find_document_files(root), root, out, plan(), logged.append)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "complete" in logged[0]


@pytest.mark.parametrize("change", [{"seed": 2}, {"n_chunks": 3}, {"n_validation": 9}])
def test_a_folder_made_with_other_options_is_not_touched(root, tmp_path, change):
    out = tmp_path / "out"
    shuffle(root, out)
    before = files_of(out)
    names = {"n_chunks": "nchunks", "n_validation": "validation_documents", "seed": "seed"}
    name = names[next(iter(change))]
    with pytest.raises(UserError, match=f"was made with {name}="):
        shuffle(root, out, **change)
    assert files_of(out) == before


def test_order_does_not_depend_on_memory(root, tmp_path, monkeypatch):
    shuffle(root, tmp_path / "want", memory=10**9)  # one pile
    want = files_of(tmp_path / "want")
    depths = set()
    sort = shuffling._sorted_lines

    def sorted_lines(pile, *args):
        depths.add(pile.name.count("."))
        return sort(pile, *args)

    monkeypatch.setattr(shuffling, "_sorted_lines", sorted_lines)
    for memory in (1000, 4000):
        shuffle(root, tmp_path / str(memory), memory=memory)
        assert files_of(tmp_path / str(memory)) == want
    assert len(depths) > 1  # piles of piles


def test_memory_is_bounded(tmp_path):
    root, memory = tmp_path / "sources", 2_000_000
    root.mkdir()
    (root / "a.jsonl").write_text((json.dumps({"text": "x" * 1000}) + "\n") * 6000)
    tracemalloc.start()
    shuffle(root, tmp_path / "out", memory=memory)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert memory / 2 < peak < memory


def interrupted(root, tmp_path, monkeypatch, at: str, **changes) -> None:
    """Leave the work as it is when stage `at` fails to start."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(shuffling._Shuffle, at, lambda *_: (_ for _ in ()).throw(RuntimeError))
        shuffle(root, tmp_path / "out", **changes)


@pytest.mark.parametrize(
    "at, change, message",
    [
        ("write_chunks", {"seed": 7}, "seed=1"),
        ("finish", {"seed": 7}, "seed=1"),
        ("finish", {"n_chunks": 3}, "nchunks=7"),
    ],
)
def test_work_started_with_other_options_is_not_resumed(
    root, tmp_path, monkeypatch, at, change, message
):
    interrupted(root, tmp_path, monkeypatch, at)
    with pytest.raises(UserError, match=f"was started with {message}"):
        shuffle(root, tmp_path / "out", **change)


def test_memory_and_chunks_may_change_before_chunks_are_written(root, tmp_path, monkeypatch):
    shuffle(root, tmp_path / "want", n_chunks=3)
    interrupted(root, tmp_path, monkeypatch, "write_chunks", memory=9000)
    shuffle(root, tmp_path / "out", n_chunks=3)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "want")


def test_two_processes_do_not_mix(root, tmp_path, monkeypatch):
    def second(_):
        child = os.fork()
        if child == 0:
            try:
                shuffle(root, tmp_path / "out")
            except UserError as error:
                os._exit(7 if "another run writes there" in str(error) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        raise RuntimeError

    monkeypatch.setattr(shuffling._Shuffle, "write_chunks", second)
    with pytest.raises(RuntimeError):
        shuffle(root, tmp_path / "out")


@pytest.mark.parametrize("at", ["last", "first"])
def test_the_work_resumes_after_a_broken_file_is_repaired(root, tmp_path, monkeypatch, at):
    monkeypatch.setattr(shuffling, "SAVE_EVERY", 0)
    shuffle(root, tmp_path / "want")
    file = root / ("a b/000.parquet" if at == "first" else "plain.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] if at == "first" else whole + b"\n{")
    with pytest.raises(UserError, match=file.name):
        shuffle(root, tmp_path / "out")
    assert (tmp_path / "out.unfinished/progress.json").exists() == (at == "last")
    file.write_bytes(whole)
    shuffle(root, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "want")


def test_sources_that_changed_after_they_were_read_are_refused(root, tmp_path, monkeypatch):
    interrupted(root, tmp_path, monkeypatch, "write_chunks")
    (root / "plain.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(UserError, match="other source files: plain.jsonl"):
        shuffle(root, tmp_path / "out")
    shuffle(root, tmp_path / "new", n_validation=1)
    (root / "more.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(UserError, match="made from other source files"):
        shuffle(root, tmp_path / "new", n_validation=1)


def test_a_finished_folder_that_lost_data_is_refused(root, tmp_path):
    shuffle(root, tmp_path / "out")
    (tmp_path / "out/x.chunk.03.jsonl").write_bytes(b"{}\n")
    with pytest.raises(UserError, match="03.jsonl is 3 bytes long and was made with"):
        shuffle(root, tmp_path / "out")
    (tmp_path / "out/x.chunk.03.jsonl").unlink()
    with pytest.raises(UserError, match="03.jsonl is missing"):
        shuffle(root, tmp_path / "out")


def test_too_few_documents_are_refused_and_the_next_try_resumes(root, tmp_path):
    with pytest.raises(UserError, match="400 documents .*--validation_documents 398"):
        shuffle(root, tmp_path / "out", n_validation=398)
    with pytest.raises(UserError, match="400 documents .*--nchunks 401"):
        shuffle(root, tmp_path / "out", n_validation=0, n_chunks=401)
    assert shuffle(root, tmp_path / "out")["documents"] == N_DOCUMENTS


def test_a_document_larger_than_memory_is_shuffled(tmp_path):
    root = tmp_path / "sources"
    root.mkdir()
    rows = [{"text": "x" * 5000}, *({"text": str(i)} for i in range(50))]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shuffle(root, tmp_path / "out", memory=1000, n_validation=1, n_chunks=2)
    assert Counter(texts(files_of(tmp_path / "out"), ".jsonl")) == Counter(r["text"] for r in rows)
