"""Test plots of metrics: which lines they have, their data, labels and axes."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from apps.LT2.scripts import figure, plot
from apps.LT2.scripts.figure import plain_number
from apps.LT2.scripts.plot import main
from lingua.errors import UserError

pyplot = pytest.importorskip("matplotlib.pyplot")


def write_run(folder: Path, options: dict[str, Any], losses: list, *, old: bool = False) -> Path:
    """Write a run with a record every 10 steps and one validation at the end."""
    folder.mkdir(parents=True)
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in options.items()]
    (folder / "config.yaml").write_text("".join(lines))
    records: list[dict[str, Any]] = []
    for i, loss in enumerate(losses, start=1):
        at = {"optim/total_tokens": 1000 * i}
        if not old:
            at |= {"optim/total_flops": 5e15 * i, "time/elapsed": 2.0 * i}
        records.append({"global_step": 10 * i, "loss/out": loss, "layout": "gF"} | at)
    records.append({"global_step": 10 * len(losses), "loss/val": losses[-1]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


MODELS = list(itertools.product(["gdn", "kda"], [1, 2, 4], [0, 1]))


@pytest.fixture(scope="module")
def tune(tmp_path_factory):
    """Twelve runs: the loss is 8 - T, plus 1 for kda, plus or minus 0.5 by seed.

    The FFN follows from mixer and T, as after match=parameters.
    """
    folder, swept = tmp_path_factory.mktemp("runs") / "tune", {}
    for mixer, loops, seed in MODELS:
        model = {"mixer": mixer, "loop_count": loops, "multiple_of": 8 * loops + (mixer == "kda")}
        options = {"model": model, "seed": seed, "steps": 20}
        values = {"model.mixer": mixer, "model.loop_count": loops, "seed": seed}
        swept[f"{mixer}-{loops}-{seed}"] = values
        last = 8.0 - loops + (mixer == "kda") + seed - 0.5
        write_run(folder / f"{mixer}-{loops}-{seed}", options, [9.0, last])
    (folder / "sweep.json").write_text(json.dumps(swept))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Keep each figure that is saved, without rendering it."""
    figures: list[Any] = []
    monkeypatch.setattr(plot, "save_figure", lambda made, out: figures.append(made))
    return figures


def rows(file: Path) -> list[dict[str, str]]:
    with open(file) as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize(
    "x, key, values",
    [
        ("steps", "global_step", [10, 20]),
        ("tokens", "optim/total_tokens", [1000, 2000]),
        ("flops", "optim/total_flops", [5e15, 1e16]),
        ("seconds", "time/elapsed", [2, 4]),
    ],
)
def test_a_curve_over_each_axis_is_averaged_over_seeds(tune, tmp_path, drawn, x, key, values):
    main([str(tune), f"x={x}", "by=mixer,loop_count", "mean=seed", f"out={tmp_path}/a.png"])
    found = rows(tmp_path / "a.csv")
    assert len(found) == 12
    of_kda = [r for r in found if (r["model.mixer"], r["model.loop_count"]) == ("kda", "4")]
    assert [float(row[key]) for row in of_kda] == values
    assert [float(row["loss/out"]) for row in of_kda] == [9.0, 5.0]
    assert float(of_kda[1]["std"]) == pytest.approx(0.5**0.5) and of_kda[1]["n"] == "2"


def test_final_values_against_an_option(tune, tmp_path, drawn, capsys):
    main([str(tune), "x=loop_count", "by=mixer", "mean=seed", f"out={tmp_path}/new/a.png"])
    assert "\nkda: loss/val 5 ± 0.707 (n=2)" in capsys.readouterr().out
    points = rows(tmp_path / "new" / "a.csv")
    assert points[0]["run"] == "gdn-1-0; gdn-1-1"
    found = [(r["model.mixer"], r["model.loop_count"], r["loss/val"]) for r in points]
    assert found == [
        *(("gdn", "1", "7.0"), ("gdn", "2", "6.0"), ("gdn", "4", "4.0")),
        *(("kda", "1", "8.0"), ("kda", "2", "7.0"), ("kda", "4", "5.0")),
    ]
    axes = drawn[0].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    assert [text.get_text() for text in axes.texts] == ["gdn", "kda"] and not drawn[0].legends


def test_a_single_line_over_an_option_has_the_name_of_no_run(tmp_path, drawn, capsys):
    for loops in (1, 4):
        write_run(tmp_path / f"runs/{loops}", {"model": {"loop_count": loops}}, [9.0, 8.0 - loops])
    main([str(tmp_path / "runs"), "x=loop_count", f"out={tmp_path}/a.png"])
    assert capsys.readouterr().out.startswith("loss/val 4 at model.loop_count 4\n")
    assert [row["run"] for row in rows(tmp_path / "a.csv")] == ["1", "4"]


def test_a_mean_of_one_run_says_so(tune, tmp_path, drawn, capsys):
    runs = [f"{tune}/gdn-*", f"{tune}/kda-*-1", f"{tune}/kda-1-0"]
    main([*runs, "x=loop_count", "mean=seed", f"out={tmp_path}/a.png"])
    assert "\nkda: loss/val 5.5 (n=1) at" in capsys.readouterr().out


def test_an_option_that_follows_from_no_other_names_the_lines(tmp_path, drawn):
    swept = {}
    for i, (lr, dim) in enumerate(((1, 16), (2, 16), (1, 32))):  # the sweep was extended
        folder = write_run(tmp_path / "runs" / f"{i}", {"model": {"dim": dim}}, [9.0, 8.0 - i])
        swept[folder.name] = {"optim.lr": lr, "seed": i}
    (tmp_path / "runs" / "sweep.json").write_text(json.dumps(swept))
    main([str(tmp_path / "runs"), "x=lr", "mean=seed", f"out={tmp_path}/a.png"])
    assert [row["model.dim"] for row in rows(tmp_path / "a.csv")] == ["16", "16", "32"]


def pale(axes) -> list[tuple[list[float], list[float]]]:
    return [(list(x.get_xdata()), list(x.get_ydata())) for x in axes.lines if x.get_alpha()]


@pytest.mark.parametrize("x, by", [("loop_count", "mixer"), ("mixer", "loop_count")])
def test_each_run_is_a_point_beside_its_mean(tune, tmp_path, drawn, x, by):
    main([str(tune), f"x={x}", f"by={by}", "mean=seed", f"out={tmp_path}/a.png"])
    axes = drawn[0].axes[0]
    places: dict[Any, float] = {"gdn": 0, "kda": 1} if x == "mixer" else {1: 1, 2: 2, 4: 4}
    expected = [
        ([places[mixer if x == "mixer" else T]], [8.0 - T + (mixer == "kda") + seed - 0.5])
        for mixer, T, seed in MODELS
    ]
    assert sorted(pale(axes)) == sorted(expected)
    runs = [line for line in axes.lines if line.get_alpha()]
    axes.figure.draw_without_rendering()
    at = {
        (line.get_color(), *line.get_transform().transform(line.get_xydata())[0]) for line in runs
    }
    columns = {(colour, round(x)) for colour, x, _ in at}
    assert len({x for _, x in columns}) == len(columns) == 6  # no run hides one of another line
    low, high = axes.get_ylim()
    assert low < 3.5 and high > 8.5
    found = rows(tmp_path / "a.csv")[0]
    assert (found["run"], found["of_runs"]) == ("gdn-1-0; gdn-1-1", "6.5; 7.5")


@pytest.mark.parametrize(
    "xs, logx, nearest",
    [([1, 2, 101], False, 8 * 72 / 100), ([0, 1, 100], True, 8 * 72), ([-2, -1], True, 0)],
)
def test_runs_stay_near_their_x(xs, logx, nearest):
    lines = [figure.Line(xs, xs, runs=[([x], [x]) for x in xs]) for _ in range(6)]
    plot.shift_runs(lines, plot.PlotArgs(logx=logx))
    shifts = [line.shift for line in lines]
    assert sum(shifts) == pytest.approx(0)
    assert max(shifts) - min(shifts) == pytest.approx(5 / 6 * min(25, nearest / 2))


def test_each_run_is_a_pale_curve(tune, tmp_path, drawn):
    main([f"{tune}/kda-4-*", "mean=seed", "smooth=3", f"out={tmp_path}/a.png"])
    axes = drawn[0].axes[0]
    assert pale(axes) == [([10, 20], [9.0, 4.5]), ([10, 20], [9.0, 5.5])]
    assert [row["of_runs"] for row in rows(tmp_path / "a.csv")] == ["9.0; 9.0", "4.5; 5.5"]
    main([f"{tune}/kda-4-*", f"out={tmp_path}/a.png"])
    assert not pale(drawn[1].axes[0]) and "of_runs" not in rows(tmp_path / "a.csv")[0]


def test_at_most_twelve_lines_are_labelled_outside_the_axes(tmp_path, drawn, capsys):
    for i in range(20):
        write_run(tmp_path / "runs" / f"{i}", {"optim": {"lr": i / 100}}, [9.0, 8.0 + i / 100])
    main([str(tmp_path / "runs"), f"out={tmp_path}/a.png"])
    (legend,) = drawn[0].legends
    assert len(legend.get_texts()) == 12 and "8 others" in capsys.readouterr().out
    drawn[0].draw_without_rendering()
    box, axes = legend.get_window_extent(), drawn[0].axes[0].get_window_extent()
    assert box.x0 >= axes.x1 and box.x1 <= drawn[0].bbox.x1
    assert len(drawn[0].axes[0].lines) == 20


def test_lines_that_differ_in_many_options_have_names_of_runs(tmp_path, drawn, capsys):
    for i in range(3):
        options = {"model": {f"size_{j}": i for j in range(20)}}
        write_run(tmp_path / "runs" / f"run_{i}", options, [9.0, 5.0 + i])
    main([str(tmp_path / "runs"), f"out={tmp_path}/a.png"])
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["run_0", "run_1", "run_2"]
    out = capsys.readouterr().out
    assert "run_0: loss/out 5 at" in out and "and 8 more; by=" in out
    assert rows(tmp_path / "a.csv")[0]["model.size_19"] == "0"
    main([str(tmp_path / "runs"), "by=size_3", f"out={tmp_path}/a.png"])
    assert "size_3=1, run_1: loss/out 6" in capsys.readouterr().out
    assert [t.get_text() for t in drawn[1].axes[0].texts] == ["size_3=0", "size_3=1", "size_3=2"]


def test_a_line_that_ended_early_bounds_the_mean(tmp_path, drawn, caplog):
    for seed, losses in enumerate(([9.0, 8.0, 7.0], [7.0, 6.0], [5.0, 4.0, None])):
        write_run(tmp_path / "runs" / f"{seed}", {"seed": seed}, losses)
    (tmp_path / "runs" / "3").mkdir()
    (tmp_path / "runs" / "3" / "config.yaml").write_text("seed: 3\n")
    main([str(tmp_path / "runs"), "mean=seed", f"out={tmp_path}/a.png"])
    assert [(r["global_step"], r["loss/out"], r["n"]) for r in rows(tmp_path / "a.csv")] == [
        ("10.0", "7.0", "3"),
        ("20.0", "6.0", "3"),
    ]
    assert "a mean ends at" in caplog.text and "skipped 3:" in caplog.text


def test_the_last_value_is_not_the_last_finite_one(tmp_path, drawn, caplog):
    for i, losses in enumerate(([9.0, 8.0], [9.0, 7.0], [5.0, None])):
        write_run(tmp_path / "runs" / f"{i}", {"optim": {"lr": i}}, losses)
    main([str(tmp_path / "runs"), "x=lr", "y=loss/out", f"out={tmp_path}/a.png"])
    assert [row["loss/out"] for row in rows(tmp_path / "a.csv")] == ["8.0", "7.0"]
    assert "skipped 2: the last loss/out is NaN" in caplog.text


@pytest.mark.parametrize(
    "suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_the_suffix_chooses_the_format(tune, tmp_path, suffix, start):
    options = ["logx=true", "logy=true", "smooth=3", "by=mixer", "size=[4,3]"]
    main([str(tune), *options, f"out={tmp_path}/a.{suffix}"])
    assert (tmp_path / f"a.{suffix}").read_bytes().startswith(start)


@pytest.mark.parametrize(
    "value, text",
    [(0.25, "0.25"), (2000, "2000"), (20000, "20k"), (1.5e6, "1.5M"), (3e9, "3B"), (2e18, "2e18")],
)
def test_ticks_are_plain_numbers(value, text):
    assert plain_number(value) == text


@pytest.mark.parametrize(
    "options, message",
    [
        (["y=los"], "y=los: .*loss/out, loss/val"),
        (["by=mixr"], "by=mixr: .*model.mixer"),
        (["x=lop"], "x=lop: .*model.loop_count.*tokens"),
        (["x=steps", "y=val"], "one point.*x=<option>"),
        (["mean=sed"], "mean=sed"),
        (["by=model.seed"], "by=model.seed"),
        (["out=a.gif"], r"out=a.gif.*\.png"),
        (["smooth=0"], "smooth=0"),
        (["size=[1]"], "size="),
    ],
)
def test_mistakes_are_one_line(tune, options, message):
    with pytest.raises(UserError, match=message):
        main([str(tune), *options])
    assert not list(tune.glob("plot*"))


def test_runs_without_the_axis_or_any_metric(tune, tmp_path, drawn, caplog):
    old = write_run(tmp_path / "old", {"seed": 9}, [9.0, 8.0], old=True)
    with pytest.raises(UserError, match="optim/total_flops; x=steps or x=tokens works"):
        main([str(old), "x=flops"])
    main([str(old), str(tune), "x=flops", f"out={tmp_path}/a.png"])
    assert "skipped old: no finite optim/total_flops" in caplog.text
    with pytest.raises(UserError, match="x=seed has one value"):
        main([str(old), "x=seed"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="dump_dir"):
        main([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="out="):
        main([str(old), str(tune)])


def test_other_plots_of_a_run_have_other_names(tmp_path, capsys):
    run = write_run(tmp_path / "r", {"seed": 0}, [9.0, 8.0])
    names = ["plot"]
    names += ["plot_x=tokens", "plot_x=tokens,y=loss-out", "plot_x=tokens,smooth=3,logx=true"]
    for options in (
        [],
        ["x=tokens"],
        ["y=loss/out", "x=tokens"],
        ["x=tokens", "smooth=3", "logx=true"],
    ):
        main([str(run), *options])
    made = {file.name for file in run.glob("plot*")}
    assert made == {f"{name}{suffix}" for name in names for suffix in (".png", ".csv")}
    assert f"figure: {run}/plot_x=tokens.png" in capsys.readouterr().out
    main([str(run), "x=steps"])
    assert {file.name for file in run.glob("plot*")} == made


BPB = {"bpb": "loss/val_bpb", "T=1": "loss/val_bpb/1"}


@pytest.mark.parametrize(
    "plots, columns, options, y",
    [
        ([("loops", "val_bpb")], {}, ["x=loops"], "loss/val_bpb"),
        ([("loops", "val_bpb")], {}, ["x=loops", "y=loss/val"], "loss/val"),
        ([("loops", "val_bpb")], {"T=1": "loss/val_bpb/1"}, ["x=arm"], "loss/val_bpb"),
        ([("loops", "val_bpb")], BPB, ["x=tokens"], "loss/out"),
        ([("flops", "optim/norm")], BPB, [], "optim/norm"),
        ([("flops", "optim/norm")], BPB, ["x=arm"], "loss/val_bpb"),
        ([("flops", "optim/norm")], BPB, ["x=loops"], "loss/val_bpb"),
        ([("dim", "optim/norm")], BPB, ["x=arm"], "optim/norm"),
        ([("depth", "optim/norm")], {"growth": "rms/1 / rms/0"}, ["x=loops"], "loss/val"),
    ],
)
def test_a_plot_of_a_study_has_the_metric_of_its_report(
    tmp_path, drawn, capsys, plots, columns, options, y
):
    for arm in ("a", "b"):
        run = write_run(tmp_path / "s" / arm, {"arm": arm}, [9.0, 8.0])
        scores: dict[str, float] = {"loss/val": 8.0, "loss/val_bpb": 3.0, "optim/norm": 1.0}
        scores |= {f"{key}/{T}": 1.0 for key in ("loss/val", "loss/val_bpb") for T in (1, 2)}
        with open(run / "metrics.jsonl", "a") as log:
            log.writelines(json.dumps({"global_step": s, **scores}) + "\n" for s in (10, 20))
    record = {"plots": [{"x": x, "y": y} for x, y in plots], "columns": columns}
    (tmp_path / "s" / "study.json").write_text(json.dumps(record))
    main([str(tmp_path / "s"), *options, f"out={tmp_path}/a.png"])
    assert y in rows(tmp_path / "a.csv")[0]
    says = "as in the report of the study" in capsys.readouterr().out
    assert says == (y not in ("loss/val", "loss/out"))


def test_labels_that_would_overlap_become_a_legend():
    for losses, has_legend in (([5.0, 6.0, 7.0], False), ([5.0, 5.001, 7.0], True)):
        made, axes = pyplot.subplots(layout="constrained")
        lines = [figure.Line([0.0, 1.0], [8.0, y], f"line {y}") for y in losses]
        figure.draw_lines(axes, lines)
        figure.label_lines(made, axes, lines)
        assert bool(made.legends) == has_legend and len(axes.texts) == (0 if has_legend else 3)
        pyplot.close(made)


# ---- one checkpoint at several numbers of loops


@pytest.fixture
def evaluated(tmp_path):
    """Two seeds trained with 2 loops; the loss is 5 - T, plus the seed."""
    for seed in (0, 1):
        options = {"model": {"loop_count": 2}, "seed": seed}
        run = write_run(tmp_path / "runs" / str(seed), options, [9.0, 8.0])
        lines = []
        for step, counts in ((10, [1, 2, 4]), (20, [1, 2, 4]), (30, [2])):
            for T in counts:
                record: dict[str, Any] = {"global_step": step, "loops": T, "flops_per_token": 2**T}
                record |= {"loss/val": 5 - T + seed + (step == 10)}
                differs = {} if T == 2 else {"loop_count": T}
                differs |= {"exit": "none"} if seed else {}  # the run's own is gate:0.5
                record |= {"made_with": {"loop_count": T}, "differs_from_run": differs}
                lines.append(json.dumps(record))
        other = {**record, "global_step": 20, "loss/val": 0}
        early = {"made_with": {"loop_count": 2, "exit": "gate:0.5"}, "differs_from_run": {}}
        for changes in ({"differs_from_run": {"limit": 2}}, *([early] if seed else [])):
            lines.append(json.dumps({**other, **changes}))
        (run / "metrics.validation.jsonl").write_text("\n".join(lines))
    return tmp_path / "runs"


@pytest.mark.parametrize("x, at", [("loops", ["1", "2", "4"]), ("loop_flops", ["2", "4", "16"])])
def test_scores_against_loops(evaluated, tmp_path, drawn, x, at):
    main([str(evaluated), f"x={x}", "mean=seed", f"out={tmp_path}/a.png"])
    found = rows(tmp_path / "a.csv")
    assert [float(r[x]) for r in found] == [float(text) for text in at]
    assert [(float(r["loss/val"]), r["loops"], r["trained"], r["n"]) for r in found] == [
        *((4.5, "1", "False", "2"), (3.5, "2", "True", "2"), (1.5, "4", "False", "2")),
    ]
    circle = drawn[0].axes[0].lines[-1]
    assert (circle.get_xdata()[0], circle.get_ydata()[0]) == (float(at[1]), 3.5)


def write_evaluations(folder: Path, seed: int, *by_options: tuple[dict[str, Any], list[int]]):
    """Write a run trained with 2 loops, and evaluations with other options at several T.

    The loss is 5 - T, plus 10 for the second options.
    """
    run = write_run(folder / str(seed), {"model": {"loop_count": 2}, "seed": seed}, [9.0, 8.0])
    with open(run / "metrics.validation.jsonl", "w") as log:
        for i, (options, counts) in enumerate(by_options):
            for T in counts:
                differs = options | ({} if T == 2 else {"loop_count": T})
                record = {"global_step": 20, "loss/val": 5 - T + 10 * i, "flops_per_token": 2**T}
                record |= {"made_with": {"loop_count": T}, "differs_from_run": differs}
                log.write(json.dumps(record) + "\n")


SHORT: dict[str, Any] = {"validation.max_steps": 50}
LIMIT: dict[str, Any] = {"validation.max_steps": 9}


@pytest.mark.parametrize(
    "evaluations, losses, message",
    [
        ([(SHORT, [1, 2, 4])], [4, 3, 1], "drawn are evaluations with validation.max_steps=50"),
        ([({}, [2]), (SHORT, [1, 4])], [14, 11], "max_steps=50; left out: the run's own options"),
        ([({}, [1, 2]), (SHORT, [1, 2, 4])], [4, 3], "own options; left out: .*max_steps=50"),
        ([(LIMIT, [1, 2]), (SHORT, [1, 2, 4])], [14, 13, 11], "max_steps=50; left out: .*=9"),
        ([({}, [1, 2]), (SHORT, [4])], [4, 3], "own options; left out: .*max_steps=50"),
    ],
)
@pytest.mark.parametrize("x", ["loops", "loop_flops"])
def test_a_line_has_evaluations_of_equal_options(
    tmp_path, drawn, caplog, x, evaluations, losses, message
):
    write_evaluations(tmp_path, 0, *evaluations)
    main([str(tmp_path / "0"), f"x={x}", f"out={tmp_path}/a.png"])
    assert [float(r["loss/val"]) for r in rows(tmp_path / "a.csv")] == losses
    (record,) = caplog.records
    assert re.search(f"^plot: 0: .*{message}$", record.message)
    title = drawn[0].axes[0].get_title(loc="left")
    assert ("evaluated with" in title) == ("with the run's own" not in record.message)


def test_a_mean_is_over_evaluations_of_equal_options(tmp_path, drawn, caplog):
    write_evaluations(tmp_path / "runs", 0, ({}, [1, 2, 4]), (SHORT, [1, 4]))
    write_evaluations(tmp_path / "runs", 1, ({}, [2]), (SHORT, [1, 4]))
    write_evaluations(tmp_path / "runs", 2, ({}, [1, 2]))
    write_evaluations(tmp_path / "runs", 3, ({}, [2]), (SHORT, [1, 4]))
    main([str(tmp_path / "runs"), "x=loops", "mean=seed", f"out={tmp_path}/a.png"])
    found = [(float(r["loss/val"]), r["run"]) for r in rows(tmp_path / "a.csv")]
    assert found == [(14, "0; 1; 3"), (11, "0; 1; 3")]
    assert "plot: 0, 1, 3: drawn" in caplog.text and "plot: 2: not drawn" in caplog.text


def test_each_line_names_the_options_of_its_evaluations(tmp_path, drawn):
    write_evaluations(tmp_path / "runs", 0, ({}, [1, 2]))
    write_evaluations(tmp_path / "runs", 1, (SHORT, [1, 2]))
    main([str(tmp_path / "runs"), "x=loops", f"out={tmp_path}/a.png"])
    found = [(r["run"], r["evaluated_with"]) for r in rows(tmp_path / "a.csv")]
    own, other = "the run's own options", "validation.max_steps=50"
    assert found == [("0", own), ("0", own), ("1", other), ("1", other)]


def test_lines_have_evaluations_of_the_options_that_all_runs_have(tmp_path, drawn, caplog):
    write_evaluations(tmp_path / "runs", 0, ({}, [1, 2, 4]), (SHORT, [1, 2, 4]))
    write_evaluations(tmp_path / "runs", 1, ({}, [2]), (SHORT, [1, 2, 4]))
    main([str(tmp_path / "runs"), "x=loops", f"out={tmp_path}/a.png"])
    assert [float(r["loss/val"]) for r in rows(tmp_path / "a.csv")] == [14, 13, 11] * 2
    assert "plot: 0, 1: drawn are evaluations with validation.max_steps=50" in caplog.text


def test_other_options_at_one_T_are_no_line(tmp_path, drawn):
    write_evaluations(tmp_path, 0, (SHORT, [4]))
    with pytest.raises(UserError, match="loop_counts"):
        main([str(tmp_path / "0"), "x=loops", f"out={tmp_path}/a.png"])


@pytest.mark.parametrize("x", ["loops", "loop_flops"])
@pytest.mark.parametrize("n_runs", [1, 2])
def test_one_T_is_no_line(tmp_path, drawn, x, n_runs):
    runs = tmp_path / "my runs"
    for seed in range(n_runs):
        write_evaluations(runs, seed, ({}, [2]))
    with pytest.raises(UserError) as error:
        main([str(runs), f"x={x}", f"out={tmp_path}/a.png"])
    text = str(error.value)
    assert "one T" in text and "\n" not in text and "x=<option>" not in text
    assert f"lt2 eval '{runs}/0' 'loop_counts=[1,2,4]'" in text
    assert "x=loop_count" not in text


def test_one_T_a_run_may_be_final_values(tmp_path, drawn):
    write_evaluations(tmp_path / "runs", 0, ({}, [2]))
    write_evaluations(tmp_path / "runs", 1, ({}, [4]))
    (tmp_path / "runs/1/config.yaml").write_text("model: {loop_count: 4}\n")
    with pytest.raises(UserError, match="x=loop_count"):
        main([str(tmp_path / "runs"), "x=loops", f"out={tmp_path}/a.png"])


def test_evaluations_are_no_probes(evaluated, tmp_path):
    with pytest.raises(UserError, match="probe_freq; x=loops"):
        main([str(evaluated), "x=loop", "y=loss/val", f"out={tmp_path}/a.png"])


def test_losses_by_loops_of_training(tmp_path, drawn):
    run = write_run(tmp_path / "r", {"model": {"loop_count": 2}}, [9.0, 8.0])
    record = {"global_step": 20, "loss/val": 8.0, "loss/val/1": 8.5, "loss/val/2": 8.0}
    with open(run / "metrics.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")
    main([str(run), "x=loops", f"out={tmp_path}/a.png"])
    assert [(r["loops"], r["loss/val"]) for r in rows(tmp_path / "a.csv")] == [
        *(("1", "8.5"), ("2", "8.0")),
    ]
    with pytest.raises(UserError, match="loop_counts"):
        main([str(run), "x=loop_flops", f"out={tmp_path}/a.png"])


@pytest.mark.parametrize("x, y", [("loop", "residual_rms"), ("depth", "depth/first_token_mass")])
def test_probes_count_loops_and_layers_from_1(tmp_path, drawn, x, y):
    name = y if "/" in y else f"loops/{y}"
    for seed in (0, 1):
        run = write_run(
            tmp_path / "runs" / str(seed), {"model": {"loop_count": 2}, "seed": seed}, [9]
        )
        probed = [{f"{name}/0": 1.0, f"{name}/1": 7.0}, {f"{name}/0": 2.0, f"{name}/1": 3.0 + seed}]
        with open(run / "metrics.jsonl", "a") as log:
            log.writelines(
                json.dumps({"global_step": 20 + i, **p}) + "\n" for i, p in enumerate(probed)
            )
    main([str(tmp_path / "runs"), f"x={x}", f"y={y}", "mean=seed", f"out={tmp_path}/a.png"])
    found = [(float(r[x]), float(r[name]), r["n"]) for r in rows(tmp_path / "a.csv")]
    assert found == [(1.0, 2.0, "2"), (2.0, 3.5, "2")]
    mean, *others = [x for x in drawn[0].axes[0].lines if not x.get_alpha()]
    assert list(mean.get_ydata()) == [2.0, 3.5] and not others  # no circle
    assert pale(drawn[0].axes[0]) == [([1, 2], [2.0, 3.0]), ([1, 2], [2.0, 4.0])]


@pytest.mark.parametrize(
    "has_probes, other", [(False, "train with probe_freq"), (True, "use loops/rms")]
)
def test_runs_without_scores_by_loops(tmp_path, has_probes, other):
    run = write_run(tmp_path / "r", {"model": {"loop_count": 2}}, [9.0, 8.0])
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"global_step": 20, "loops/rms/0": 1.0}\n' if has_probes else "")
    with pytest.raises(UserError, match=rf"lt2 eval {run} 'loop_counts=\[1,2,4\]', or {other}"):
        main([str(run), "x=loops", f"out={tmp_path}/a.png"])
