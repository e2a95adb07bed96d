"""setup/reference_values.py: byte entropy, xz and a model, in bits per byte of one text."""

from __future__ import annotations

import json
import random

import pytest

from lingua.args import dump_config
from tests.setup_scripts import load_script

script = load_script("reference_values")


def write_run(tmp_path, train: str, held_out: str, **record: float) -> None:
    source = tmp_path / "data" / "text"
    source.mkdir(parents=True)
    for name, text in (("a.chunk.00", train), ("a.val", held_out)):
        (source / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    data = {"root_dir": str(tmp_path / "data"), "sources": {"text": 1.0}}
    dump_config({"data": data}, tmp_path / "config.yaml")
    records = [{"global_step": 4, "loss/val_bpb": 9.0}, {"global_step": 8} | record]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines)


def test_the_table_has_all_four_values(tmp_path, capsys):
    letters = random.Random(0).choices("abcdefgh", k=40_000)
    train = "".join(letters)
    write_run(tmp_path, train, train[5000:25_000], **{"loss/val_bpb": 3.21})
    script.main([str(tmp_path)])
    title, *rows = capsys.readouterr().out.splitlines()
    assert "(20,002 bytes)" in title
    values = {row.rsplit(maxsplit=1)[0].strip(): float(row.split()[-1]) for row in rows}
    assert values.pop("this model, 8 steps") == 3.21
    entropy, xz, xz_after = values.values()
    assert entropy == pytest.approx(3, abs=0.01)  # eight letters, equally frequent
    assert 3 < xz < 3.5 and xz_after < 0.1  # the held-out text repeats the training text


def test_byte_entropy():
    assert script.byte_entropy(b"a" * 9) == 0
    assert script.byte_entropy(b"aab" * 100) == pytest.approx(0.9183, abs=1e-4)


def test_a_run_without_validation_has_no_table(tmp_path, capsys):
    write_run(tmp_path, "some text", "other text")
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 8}\n')
    script.main([str(tmp_path)])
    assert capsys.readouterr().out == ""
