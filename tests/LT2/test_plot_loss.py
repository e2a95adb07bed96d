"""Test the loss plot: reading metrics.jsonl, and writing a figure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from apps.LT2.scripts import plot_loss
from apps.LT2.scripts.plot_loss import main, read_curve, smooth
from lingua.errors import UserError
from lingua.metrics import json_line


def write_run(folder: Path, records: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


RECORDS = [
    {"global_step": 10, "loss/out": 7.0, "speed/wps": 1.0},
    {"global_step": 20, "loss/out": 6.0},
    {"global_step": 20, "loss/val": 6.5, "loss/val_bpb": 2.9},
    {"global_step": 30, "loss/out": 5.0},
    {"global_step": 30, "loss/val": 5.5, "loss/val_bpb": 2.5},
]


def test_reads_train_and_validation_points(tmp_path):
    curve = read_curve(write_run(tmp_path / "run", RECORDS, tail='{"global_step": 40, "lo'))
    assert curve.train == [(10, 7.0), (20, 6.0), (30, 5.0)]
    assert curve.val == [(20, 6.5), (30, 5.5)]
    assert curve.summary() == (
        "run: training loss 5.000 at step 30, "
        "validation loss 5.500 (2.500 bits per byte) at step 30"
    )


def test_a_loss_that_was_no_number_is_told_of_and_not_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    diverged = [
        {"global_step": 40, "loss/out": math.nan},
        {"global_step": 40, "loss/val": math.inf, "loss/val_bpb": math.inf},
    ]
    run = write_run(tmp_path / "run", RECORDS, tail="".join(map(json_line, diverged)))
    main([str(run)])
    out = capsys.readouterr().out
    assert "validation loss 5.500 (2.500 bits per byte) at step 30, 2 losses were NaN" in out
    assert read_curve(run).train == [(10, 7.0), (20, 6.0), (30, 5.0)]


def test_smoothing_keeps_a_straight_line_and_calms_noise():
    line = [100 - 0.5 * i for i in range(200)]
    assert smooth(line) == pytest.approx(line)
    noise = [(-1.0) ** i for i in range(200)]
    assert max(map(abs, smooth(noise)[20:-20])) < 0.2
    assert smooth([3.0]) == [3.0]


def test_draws_one_run_into_its_folder_and_several_where_told(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a, b = write_run(tmp_path / "a", RECORDS), write_run(tmp_path / "b", RECORDS[:2])
    main([str(a)])
    assert (a / "loss.png").read_bytes().startswith(b"\x89PNG")
    main([str(a), str(b), "--out", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").stat().st_size > 5000
    assert "2.500 bits per byte" in capsys.readouterr().out


def test_a_folder_of_runs_is_all_of_them(tmp_path, capsys, caplog):
    pytest.importorskip("matplotlib")
    tune = tmp_path / "runs" / "tune"
    for name in ("lr=1", "lr=2", "lr=3"):
        run = write_run(tune / name, RECORDS if name != "lr=3" else [])
        (run / "config.yaml").write_text("")
    (tune / "sweep.json").write_text("{}")
    (tune / "submitit").mkdir()
    main([str(tune)])
    assert (tune / "loss.png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert out.startswith("lr=1: ") and "\nlr=2: " in out and "lr=3" not in out
    assert f"skipped: {tune}/lr=3/metrics.jsonl: no loss yet" in caplog.text
    main([str(tune.parent)])
    assert capsys.readouterr().out.startswith("tune/lr=1: ")

    # as a shell expands runs/tune/*; other files are skipped with a warning
    caplog.clear()
    main([*map(str, sorted(tune.iterdir())), "--out", str(tmp_path / "all.png")])
    for name in ("loss.png", "submitit", "sweep.json"):
        assert f"skipped: {tune / name}: no metrics.jsonl" in caplog.text
    with pytest.raises(UserError, match="absent/metrics.jsonl"):  # a typo
        main([str(tune / "lr=1"), str(tmp_path / "absent"), "--out", str(tmp_path / "all.png")])


def test_twenty_runs_have_twelve_names_outside_the_axes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plot_loss, "save_figure", lambda figure, out: figures.append(figure))
    runs = [str(write_run(tmp_path / f"run {i}", RECORDS)) for i in range(20)]
    main([*runs, "--out", str(tmp_path / "all.png")])
    (figure,) = figures
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 12 and figure.axes[0].get_legend() is None
    assert legend.get_window_extent().y1 <= figure.axes[0].get_window_extent().y0


def test_mistakes_are_one_line(tmp_path):
    run = write_run(tmp_path / "run", RECORDS)
    with pytest.raises(UserError, match="name a run's dump_dir"):
        main([str(tmp_path / "absent")])
    (tmp_path / "no run").mkdir()
    with pytest.raises(UserError, match="no metrics.jsonl"):
        main([str(tmp_path / "no run")])
    with pytest.raises(UserError, match="no run with a loss"):
        main([str(tmp_path / "no run")] * 2 + ["--out", str(tmp_path / "x.png")])
    with pytest.raises(UserError, match="--out"):
        main([str(run), str(run)])
    with pytest.raises(UserError, match="no loss yet"):
        main([str(write_run(tmp_path / "empty", []))])
    with pytest.raises(UserError, match="metrics.jsonl:1: not JSON"):
        main([str(write_run(tmp_path / "broken", [], tail="{\n{}\n"))])
