"""The corpus has each text once, the same bytes on every run, and is never half done."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from lingua.errors import UserError
from tests.lingua.prepare.debs import write_apt, write_deb
from tests.setup_scripts import load_script

prepare = load_script("prepare_docs_corpus")
N_PAGES = 24
SHARED = (
    "This paragraph is in all of the packages, and so it should be in the corpus only once, as "
    "nobody wants to read it again and again."
)
COPYRIGHT = "Format: https://x\n\nFiles: *\nLicense: MIT\n"


def page(rng: random.Random) -> str:
    """Return a page of prose whose words occur nowhere else."""
    words = ["".join(rng.choices("bcdfgklmnprst", k=6)) for _ in range(60)]
    rows = [
        f"The {a} of the {b} is what {c} has." for a, b, c in zip(*[iter(words)] * 3, strict=True)
    ]
    return "".join(f"<p>{' '.join(rows[i : i + 5])}</p>\n" for i in range(0, 20, 5))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("packages")
    rng = random.Random(0)
    for name in ("a-doc", "b-doc"):
        pages = {f"usr/share/doc/{name}/p{i:02d}.html": page(rng) for i in range(N_PAGES // 2)}
        pages = {file: f"{text}<p>{SHARED}</p>" for file, text in pages.items()}
        pages |= {f"usr/share/doc/{name}/copyright": COPYRIGHT, f"usr/share/doc/{name}/a.png": "x"}
        write_deb(root, name, "1.0", pages)
    return root


def run(out: Path, *argv: str) -> dict[str, bytes]:
    prepare.main(["--out", str(out), "--train_tokenizer", "300", *argv])
    return {path.name: path.read_bytes() for path in out.iterdir()}


def documents(files: dict[str, bytes], part: str = ".jsonl") -> list[dict[str, str]]:
    lines = [line for name in sorted(files) if part in name for line in files[name].splitlines()]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def files(source, tmp_path_factory) -> dict[str, bytes]:
    return run(tmp_path_factory.mktemp("out") / "docs", "--source_dir", str(source))


def test_each_text_is_in_one_file_once(files):
    found = documents(files)
    assert len(found) == N_PAGES and len({document["id"] for document in found}) == N_PAGES
    assert sum(SHARED in document["text"] for document in found) == 1
    assert all("<" not in d["text"] and len(d["text"].split("\n\n")) >= 4 for d in found)
    assert set(files) == {
        "docs.chunk.00.jsonl",
        "docs.val.jsonl",
        "tokenizer.json",
        "manifest.json",
    }


def test_the_manifest_describes_the_packages(files, source):
    manifest = json.loads(files["manifest.json"])
    for entry, name in zip(manifest["packages"], ("a-doc", "b-doc"), strict=True):
        size = sum(len(d["text"]) for d in documents(files) if d["id"].startswith(f"{name}:"))
        assert entry["name"] == name and entry["version"] == "1.0"
        assert entry["licences"] == ["MIT"] and len(entry["sha256"]) == 64
        assert entry["bytes_in"] == (source / f"{name}_1.0_all.deb").stat().st_size
        assert entry["bytes_out"] == size and entry["documents"] == N_PAGES // 2


def test_another_run_gives_the_same_bytes(files, source, tmp_path, capsys):
    assert run(tmp_path / "docs", "--source_dir", str(source)) == files
    capsys.readouterr()
    assert run(tmp_path / "docs", "--source_dir", str(source)) == files
    said = capsys.readouterr().out
    assert "complete, nothing to do" in said and "python -m apps.LT2.train config=" in said


def test_a_text_stays_held_out_if_packages_are_added(source, tmp_path):
    more = tmp_path / "more"
    write_deb(more, "0-doc", "1.0", {f"doc/{i}.html": page(random.Random(i + 9)) for i in range(3)})
    write_deb(more, "1-doc", "1.0", {"doc/a.png": "no text"})
    for file in source.iterdir():
        os.link(file, more / file.name)
    held_out = []
    for folder, n in ((source, 8), (more, 8 + 3)):
        options = ["--source_dir", str(folder), "--validation_documents", str(n)]
        files = run(tmp_path / f"docs{n}", *options)
        held_out.append({d["text"].replace(SHARED, "") for d in documents(files, ".val.")})
    assert held_out[0] <= held_out[1]


def test_long_documents_are_cut_between_paragraphs():
    passages = [f"Passage {i} " + "x" * 1000 for i in range(150)]
    parts = list(prepare.cut(passages))
    assert "\n\n".join(parts).split("\n\n") == passages
    assert [len(part) < prepare.LONG_TEXT + 1100 for part in parts] == [True] * 3


def test_an_interrupted_run_leaves_nothing(source, tmp_path, monkeypatch, files):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "is_repeat", stop)
        run(tmp_path / "docs", "--source_dir", str(source))
    assert list(tmp_path.iterdir()) == []
    assert run(tmp_path / "docs", "--source_dir", str(source)) == files


def test_packages_come_from_apt(source, tmp_path, monkeypatch, files, capsys):
    write_apt(tmp_path / "bin", source)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    out = tmp_path / "docs"
    found = run(out, "--packages", "a-doc", "b-doc")
    assert found["docs.val.jsonl"] == files["docs.val.jsonl"]
    assert len(list((tmp_path / "docs_packages").glob("*.deb"))) == 2
    monkeypatch.setenv("PATH", str(tmp_path))  # not asked again
    assert run(out, "--packages", "b-doc", "a-doc") == found
    for other in (["--packages", "a-doc"], ["--source_dir", str(source)]):
        with pytest.raises(UserError, match="was made of other packages"):
            run(out, *other)
    with pytest.raises(UserError, match="no apt-get .* --source_dir FOLDER"):
        run(tmp_path / "other", "--packages", "a-doc")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--source_dir", "/nowhere"], "--source_dir /nowhere: no such folder"),
        (["--source_dir", "empty"], "--source_dir empty"),
        (["--packages", "x", "--source_dir", "empty"], "give only one"),
        (["--nchunks", "0"], "--nchunks 0"),
        (["--train_tokenizer", "9"], "--train_tokenizer must be 258"),
        (["--source_dir", "code"], "no English prose"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.txt").write_text("int main(void) { return 0; }\n")
    with pytest.raises(UserError, match=message):
        prepare.main(["--out", "docs", *argv])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "empty"]
