"""Documents of every format: the same texts, and errors that name the file and the line."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from lingua.errors import UserError
from lingua.prepare import readers
from lingua.prepare.readers import check_document_file, read_documents, to_line

TEXTS = ["one\nline", "über „Zitate“", '{"text": "quoted"}, [1]', "last \x00\u2028"]
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS)
ARRAY = json.dumps([{"text": text, "nested": [{"text": 1}]} for text in TEXTS], indent=1)


def texts_of(file: Path, text_field: str | None = None) -> list[str]:
    check_document_file(file, text_field)
    return [document["text"] for document in read_documents(file, text_field)]


def write(file: Path, text: str) -> Path:
    """Write `text`, compressed as the name says."""
    if file.suffix == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.output_stream(str(file), compression="zstd") as out:
            out.write(text.encode())
    else:
        file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.json", ARRAY),
        ("b.json", "\ufeff \n" + ARRAY + "\n"),
    ],
)
@pytest.mark.parametrize("window", [1, 2**20])
def test_json_is_read_in_each_form(tmp_path, monkeypatch, name, content, compression, window):
    monkeypatch.setattr(readers, "WINDOW", window)
    assert texts_of(write(tmp_path / f"{name}{compression}", content)) == TEXTS


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_a_document(tmp_path, suffix, compression):
    file = write(tmp_path / f"a{suffix}{compression}", "\ufeffone\n\n\ufefftwo\n")
    assert texts_of(file) == ["one\n\n\ufefftwo\n"]


def test_a_long_text_is_cut_at_blank_lines_without_loss(tmp_path):
    paragraph = "über\n" * 1500
    long_lines = "\n".join("y" * 50_000 for _ in range(6))
    text = "\n\n".join([paragraph] * 40) + "\n\n" + long_lines
    parts = texts_of(write(tmp_path / "a.txt", text))
    assert "".join(parts) == text and 5 < len(parts) < 12
    sizes = [len(part.encode()) for part in parts[:-1]]
    assert min(sizes) >= 2**16 and max(sizes) < 2**17 + 50_002
    assert sum(part.endswith("\n\n") for part in parts) >= len(parts) - 3


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_tables_are_read(tmp_path, kind):
    pyarrow, parquet = (pytest.importorskip(f"pyarrow{name}") for name in ("", ".parquet"))
    table = pyarrow.table({"n": [1] * 4, "text": TEXTS, "body": TEXTS[::-1], "id": [1, 2, 3, 4]})
    file = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        parquet.write_table(table, file)
    else:
        with getattr(pyarrow.ipc, f"new_{kind}")(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    assert texts_of(file) == TEXTS and texts_of(file, "body") == TEXTS[::-1]
    assert [document["id"] for document in read_documents(file)] == list("1234")
    with pytest.raises(UserError, match="no column story, but n, text, body, id.*--text_field"):
        texts_of(file, "story")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_another_field_holds_the_text(tmp_path, name):
    rows = [{"text": 3, "body": text} for text in TEXTS] + [{"text": "x", "body": None}]
    dumped = "\n".join(map(json.dumps, rows)) if name == "a.jsonl" else json.dumps(rows)
    file = write(tmp_path / name, dumped)
    assert texts_of(file, "body") == [*TEXTS, ""]
    with pytest.raises(UserError, match=r"a.jsonl?:1: .*\"story\" .*'body', 'text'.*--text_field"):
        texts_of(file, "story")


@pytest.mark.parametrize(
    "item, problem",
    [
        ('{"text": "a"', "not a JSON array"),
        ('{"text": "a"},', "not a JSON array"),
        ('{"text": "a"} {}', "not a JSON array"),
        ("3", "must be a JSON object, got int"),
        ('{"title": "y"}', 'no "text" or "content" .*\'title\''),
        ('{"text": "a", "text": "b"}', "a key is given twice"),
        ('{"text": 3}', "the text is 3"),
    ],
)
def test_a_bad_item_of_an_array_is_named(tmp_path, item, problem):
    file = write(
        tmp_path / "a.json", '[{"text": "x"},\n' * 1 + '{"text": "x"},\n' * 99 + item + "\n]"
    )
    with pytest.raises(UserError, match=rf"a.json:10[12]: .*{problem}"):
        list(read_documents(file))


@pytest.mark.parametrize("content", ['{\n "data": []\n}', '{"data": [{"text": "x"}]}'])
def test_an_object_instead_of_an_array_names_the_forms(tmp_path, content):
    with pytest.raises(UserError, match=r"a.json:1: .*; a \.json file is an array of objects"):
        texts_of(write(tmp_path / "a.json", content))


@pytest.mark.parametrize("content", ["[", "[{}", '[{"text": "x"}', '[{"text": "x"}] 3', ""])
def test_half_an_array_is_named(tmp_path, content):
    with pytest.raises(UserError, match="a.json"):
        texts_of(write(tmp_path / "a.json", content))


def test_an_empty_array_has_no_documents(tmp_path):
    assert texts_of(write(tmp_path / "a.json", "[\n]")) == []


def test_text_in_utf_16_names_its_encoding(tmp_path):
    """Read as latin1, it would be text with zeros between the letters."""
    (tmp_path / "a.txt").write_text("café", encoding="utf-16")
    with pytest.raises(UserError, match=r"a.txt:1: .*iconv -f utf-16 "):
        texts_of(tmp_path / "a.txt")


@pytest.mark.parametrize("end", [b"", b" au lait\n"], ids=["end", "middle"])
def test_text_that_is_not_utf_8_names_its_line(tmp_path, end):
    (tmp_path / "a.txt").write_bytes("one\ncafé".encode("latin1") + end)
    with pytest.raises(UserError, match=r"a.txt:2: not UTF-8 \(byte 0xe9\).*iconv"):
        texts_of(tmp_path / "a.txt")


@pytest.mark.parametrize("word", ["word ", "字", "\U0001f600 ", "x"])
def test_a_text_of_one_line_is_cut_between_words(tmp_path, word):
    text = word * (700_000 // len(word.encode()))
    parts = texts_of(write(tmp_path / "a.txt", text))
    assert "".join(parts) == text
    assert all(len(part.encode()) <= 3 * 2**16 for part in parts)
    assert all(len(part) % len(word) == 0 for part in parts)


# ---- orjson changes only the speed

ODD_LINES = [
    '{"text": "a", "text": "b"}',
    '{"text": "a", "id": 123456789012345678901234567890}',
    '{"text": "a", "id": 1.0}',
    '{"text": "a", "id": NaN}',
    '{"text": "\\ud800x", "id": "\\ud800"}',
    '{"text": "\\ud83d\\ude00", "id": true}',
    '{"text": null, "content": "c"}',
    '{"content": "c"}',
    '{"text": "", "content": "c", "id": null}',
    '{"text": " \\n", "a": {"text": 1}}',
    '{"text": "x", "a": 1e999}',
    '"text"',
    '["text"]',
    '{"text": "a"} x',
    "\ufeff" + '{"text": "a"}',
    '{"text": "control \x01"}',
]


@pytest.mark.parametrize("line", ODD_LINES)
def test_orjson_reads_the_same_documents(tmp_path, monkeypatch, line):
    pytest.importorskip("orjson")
    file = write(tmp_path / "a.jsonl", line)

    def outcome() -> object:
        try:
            return list(read_documents(file))
        except UserError as error:
            return str(error)

    fast = outcome()
    monkeypatch.setattr(readers, "orjson", None)
    assert fast == outcome()


def test_orjson_writes_the_same_lines(monkeypatch):
    pytest.importorskip("orjson")
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    documents = [{"text": every}, {"text": "x", "id": every}, {"text": "", "id": ""}]
    fast = [to_line(document, b"key") for document in documents]
    monkeypatch.setattr(readers, "orjson", None)
    assert fast == [to_line(document, b"key") for document in documents]


# ---- broken files


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.parquet", b"PAR1 this is not one"),
        ("a.parquet", b""),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20]),
        ("a.jsonl.gz", b"plain"),
        ("a.jsonl.zst", b"plain"),
    ],
    ids=["parquet", "empty parquet", "half a gz", "no gz", "no zst"],
)
def test_a_broken_file_is_named(tmp_path, name, content):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is broken"):
        list(read_documents(tmp_path / name))


def test_damage_in_the_middle_of_a_file_is_named(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"text": [f"{i * 7919}" * 50 for i in range(500)]}
    parquet.write_table(pytest.importorskip("pyarrow").table(table), tmp_path / "a.parquet")
    rows = [json.dumps({"text": hashlib.sha256(b"%d" % i).hexdigest()}) for i in range(500)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode(), mtime=0))
    for file in tmp_path.iterdir():
        content = bytearray(file.read_bytes())
        content[1000:3000] = bytes(2000)
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file.name} is broken"):
            list(read_documents(file))


@pytest.mark.parametrize(
    "table, problem",
    [
        ({"url": ["x"], "n": [1]}, " has no column text or content, but url, n"),
        ({"text": [3]}, ": the column text .*int64"),
    ],
)
def test_a_parquet_file_without_text_names_its_columns(tmp_path, table, problem):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").table(table), tmp_path / "a.parquet")
    for read in (lambda file: list(read_documents(file)), check_document_file):
        with pytest.raises(UserError, match=f"a.parquet{problem}"):
            read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not JSON in UTF-8"),
        (b"[1]", "a line must be a JSON object, got list"),
        (b'{"title": "y"}', r"""no "text" or "content" \(found: 'title'\)"""),
        (b'{"text": 3}', "the text is 3, not a string"),
        (b'{"text": null, "content": [1]}', r"the text is \[1\], not a string"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_a_bad_line_is_named(tmp_path, kind, line, problem):
    content = b'{"text": "x"}\n' * 999 + b"\n" + line + b"\n"
    file = tmp_path / f"a.{kind}"
    file.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    with pytest.raises(UserError, match=f"a.{kind}:1001: {problem}"):
        list(read_documents(file))


def test_missing_and_blank_texts_are_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": " \\n"}\n{"text": "x"}\n')
    assert [d["text"] for d in read_documents(tmp_path / "a.jsonl")] == ["", "", "x"]


def test_a_lone_surrogate_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}\n')
    assert list(read_documents(tmp_path / "a.jsonl")) == [{"text": "x\ufffdy"}]
