"""The report of the training benchmark: ratios at equal length, columns, figure, mistakes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from apps.LT2.scripts import benchmark_train_report
from apps.LT2.scripts.benchmark_report import main
from apps.LT2.scripts.benchmark_train import Row
from lingua.errors import UserError

ENVIRONMENT = {"device": "x", "torch": "2", "versions": "torch 2", "commit": "abc"}
OOM = "out of memory: CUDA out of memory"


def row(name: str, rate: float, seq_len: int = 32, **fields) -> Row:
    quartiles = (0.9 * rate, 1.2 * rate)
    return Row(name, 2_500_000, 1000, rate, quartiles, seq_len=seq_len, batch_size=2, **fields)


def save(path: Path, *rows: Row, overrides: tuple[str, ...] = ()) -> str:
    result = {"uncommitted_changes": False, "argv": ["a.yaml", *overrides], "steps": 9, "warmup": 3}
    result |= {**ENVIRONMENT, "overrides": overrides, "rows": [asdict(row) for row in rows]}
    path.write_text(f"a table\n{json.dumps(result)}\n")
    return str(path)


def report(tmp_path: Path, *argv: str) -> tuple[str, list[dict]]:
    out = tmp_path / "new" / "speed.md"
    main([*argv, "--out", str(out)])
    data = out.with_suffix(".jsonl").read_text().splitlines()
    return out.read_text(), [json.loads(line) for line in data]


def test_rows_are_relative_to_the_reference_of_their_length(tmp_path, capsys):
    kernels = {"kernel_ms": {"matrix products": 30.0, "other": 2.5}, "late_graphs": 7}
    shared = ("grad_acc_steps=1",)
    rows = row("fast", 300.0), row("pure_full", 200.0, **kernels)
    short = save(tmp_path / "a.json", *rows, overrides=shared)
    failed = Row("big", seq_len=64, batch_size=2, problem=OOM)
    rows = row("pure_full", 50.0, 64), row("fast", 40.0, 64), failed
    long = save(tmp_path / "b.json", *rows, overrides=(*shared, "data.seq_len=64"))
    text, data = report(tmp_path, short, long)
    assert "| recipe | sequence | body | tok/s | quartiles | ratio | late graphs |" in text
    assert "| fast | 32 | 2.5M | 300 | 270-360 | 1.500 | - |" in text
    assert "| pure_full | 32 | 2.5M | 200 | 180-240 | 1.000 | 7 |" in text
    assert "| fast | 64 | 2.5M | 40 | 36-48 | 0.800 | - |" in text
    assert "| big | 64 | - | OOM | - | - | - |" in text and f"- Failed: big at 64: {OOM}" in text
    assert "| recipe | step | all kernels | matrix products | other |" in text
    assert "| pure_full | 5,000.0 | 32.5 | 30.0 | 2.5 |" in text
    command = "python -m apps.LT2.scripts.benchmark_train a.yaml grad_acc_steps=1 data.seq_len=64"
    assert command in text and "- Sequence: 32; 64\n" in text and "- Commit: abc" in text
    assert [r["ratio"] for r in data] == [1.5, 1.0, 1.0, 0.8, None]
    assert "0.800" in capsys.readouterr().out


def test_an_override_of_some_files_is_part_of_the_name(tmp_path):
    old = save(tmp_path / "a.json", row("x", 10.0), overrides=("optim.lr=1",))
    overrides = ("optim.lr=1", "model.loop_count=2", "data.batch_size=2")
    new = save(tmp_path / "b.json", row("x", 20.0, n_ranks=4), overrides=overrides)
    text, data = report(tmp_path, old, new)
    assert "| x model.loop_count=2 | 4 |" in text and "torchrun --nproc-per-node 4 -m" in text
    found = [(r["recipe"], r["ratio"]) for r in data]
    assert found == [("x model.loop_count=2", 2.0), ("x", 1.0)]  # of the first


@pytest.mark.parametrize(
    "reference, ratios",
    [(None, [3.0, 2.0, 1.0]), ("b c=1", [1.5, 1.0, 0.5]), ("b", [1.0, 2 / 3, 1 / 3])],
)
def test_the_reference(tmp_path, reference, ratios):
    rows = row("b", 30.0), row("b c=1", 20.0), row("a_pure_full_b", 10.0)
    options = [] if reference is None else ["--reference", reference]
    _, data = report(tmp_path, save(tmp_path / "r.json", *rows), *options)
    assert [r["ratio"] for r in data] == pytest.approx(ratios)


def test_bars_have_whiskers_and_the_reference_has_a_mark(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(benchmark_train_report, "save_figure", lambda f, out: drawn.append(f))
    monkeypatch.setattr("matplotlib.pyplot.close", lambda figure: None)
    rows = row("b", 10.0), row("pure_full", 20.0), Row("c", seq_len=32, problem=OOM)
    report(tmp_path, save(tmp_path / "r.json", *rows, row("b", 40.0, 64)))
    short, long = drawn[0].axes
    assert [bar.get_width() for bar in short.patches] == [20, 10, 0]
    first, second, _ = (bar.get_facecolor() for bar in short.patches)
    assert first != second == long.patches[0].get_facecolor()
    whiskers = short.collections[0].get_segments()
    assert [ends[:, 0].tolist() for ends in whiskers] == [[18, 24], [9, 12], [0, 0]]
    assert [text.get_text() for text in short.texts] == ["20 (1.00)", "10 (0.50)", "OOM"]


@pytest.mark.parametrize(
    "second, options, words",
    [
        ('{"rows": [{"config": "a", "decode": {}}]}', [], "benchmark_prefill"),  # of both
        ('{"seconds": []}', [], "s.json"),
        ("[1]", [], "s.json"),
        ('{"rows": [1]}', [], "s.json"),
        ("", ["--reference", "z"], "--reference z.*a_1, a_2"),
        ("", ["--reference", "a"], "--reference=a"),
    ],
)
def test_mistakes(tmp_path, second, options, words):
    results = [save(tmp_path / "r.json", row("a_1", 1.0), row("a_2", 2.0))]
    if second:
        (tmp_path / "s.json").write_text(second)
        results.append(str(tmp_path / "s.json"))
    with pytest.raises(UserError, match=words):
        report(tmp_path, *results, *options)
    assert not (tmp_path / "new" / "speed.md").exists()
