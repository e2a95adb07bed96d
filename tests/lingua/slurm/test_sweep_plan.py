"""Plans of sweeps: options that don't apply, finished runs, and names of groups."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from typing import Any

import pytest

import apps.LT2.train as training
from apps.LT2.training.args import TrainArgs
from lingua.args import parse_args
from lingua.errors import UserError
from lingua.slurm.run_names import group_by_text, name_group
from lingua.slurm.script import StoolArgs
from lingua.slurm.sweep_plan import collected_warnings, leave_out, useful
from lingua.stool import launch_job
from lingua.sweep import as_arguments, combinations


def plan(sweep: dict[str, list[Any]], *overrides: str):
    """Leave out what has no effect in the training runs of a sweep."""
    runs = combinations(sweep)
    unused = {
        label: training.options_without_effect(
            parse_args(TrainArgs, [*overrides, *as_arguments(options)])
        )
        for label, options in runs.items()
    }
    return leave_out(StoolArgs(sweep=sweep, overrides=list(overrides)), runs, unused)


def test_options_that_do_not_apply_are_left_out():
    layouts = ["full", "gdn", "kda", "gdn*4,full"]
    sweep = {"model.attention_pattern": layouts, "model.gdn.expand_v": [1, 2]}
    runs, overrides, notes = plan(sweep, "model.n_layers=5", "model.kda.expand_v=1")
    assert [tuple(options.values()) for options in runs.values()] == [
        ("full",),
        ("gdn", 1),
        ("gdn", 2),
        ("kda",),
        ("gdn*4,full", 1),
        ("gdn*4,full", 2),
    ]
    kept = [len(overrides[label]) for label in runs]
    assert kept == [1, 1, 1, 2, 1, 1], "model.kda.expand_v is for the kda run only"
    first, second, third = notes
    assert "model.gdn.expand_v" in first and "attention_pattern=full or kda (2 runs)" in first
    assert "model.kda.expand_v" in second and "6 of 8" in third


@pytest.mark.parametrize(
    "sweep, n_runs",
    [
        # 2:0 names no hybrid mixer; full is the default value
        ({"model.attention_pattern": ["2:0", "1:1"], "model.hybrid_mixer": ["full", "gdn"]}, 3),
        ({"model.attention_pattern": ["full", "1:1"], "model.mixer": ["full", "gdn"]}, 3),
        ({"optim.name": ["adamw", "muon"], "optim.muon.momentum": [0.9, 0.95]}, 3),
        ({"optim.scheduler": ["constant", "cosine"], "optim.lr_min_ratio": [0.0, 0.1]}, 3),
        ({"model.mixer": ["full", "gdn"], "model.loop_count": [1, 2]}, 4),
    ],
)
def test_runs_that_are_equal_run_once(sweep, n_runs):
    overrides = [] if "model.mixer" in sweep else ["model.mixer=window"]
    runs, _, notes = plan(sweep, "model.n_layers=2", *overrides)
    assert len(runs) == n_runs and bool(notes) == (n_runs == 3)


def test_an_axis_without_effect_is_refused():
    with pytest.raises(UserError, match="sweep.model.gdn.expand_v .*no layer is gdn"):
        plan({"model.mixer": ["full", "kda"], "model.gdn.expand_v": [1, 2]})


def test_two_spellings_of_a_value_are_refused(project, args):
    with pytest.raises(UserError, match="steps=2 and steps=2.0 are the same"):
        launch_job(replace(args, sweep={"steps": [2, 2.0]}))
    assert not (project / "runs").exists()


def test_folders_of_options_with_the_same_last_name_differ():
    layouts = ["gdn", "kda"]
    sections = {f"model.{name}.expand_v": [1, 2] for name in layouts}
    runs, _, _ = plan({"model.attention_pattern": layouts, **sections})
    assert len(runs) == 4 and len({tuple(o.items()) for o in runs.values()}) == 4


RUNS = {
    f"{mixer}{t}{seed}": {"model.mixer": mixer, "T": t, "seed": seed}
    for mixer in ("kda", "gdn", "full")
    for t in (1, 2)
    for seed in (0, 1)
}


@pytest.mark.parametrize(
    "members, name",
    [
        (["kda10"], "kda10"),
        (list(RUNS), "all 12 runs"),
        (["kda10", "kda11", "kda20", "kda21"], "mixer=kda (4 runs)"),
        ([run for run in RUNS if "full" not in run], "mixer=kda or gdn (8 runs)"),
        (["gdn20", "gdn21"], "mixer=gdn, T=2 (2 runs)"),
        (["kda10", "gdn21"], "2 of 12 runs, such as kda10"),
    ],
)
def test_groups_of_runs_are_named_by_their_options(members, name):
    assert name_group(members, RUNS) == name


def test_equal_texts_of_runs_are_one_line():
    lines = group_by_text({"kda10": ["a", "b"], "kda11": ["b"], "gdn10": []}, RUNS)
    assert lines == ["kda10: a", "mixer=kda, T=1 (2 runs): b"]


def test_only_options_that_other_runs_need_have_no_warning():
    texts = [
        "model.gdn has no effect: no layer is gdn",
        "model.mixer=gdn has no effect: ...",
        "model.head_dim=4 has no effect: ...",
        "a window has no effect on model.gdn",
    ]
    assert useful(texts, {"model.gdn", "model.mixer"}) == texts[2:]


def test_warnings_are_collected_once(caplog):
    logger = logging.getLogger("lingua.some")
    with collected_warnings() as found:
        for _ in range(2):
            logger.warning("no effect")
    assert found == ["no effect"] and logging.getLogger().handlers


def test_finished_runs_are_not_launched_again(project, args, monkeypatch, capfd):
    launched = []
    monkeypatch.setattr(
        "lingua.stool.run_sweep_here",
        lambda sweep, jobs, at_once: launched.append([job.run_args.steps for job in jobs]),
    )
    swept = replace(args, sweep={"steps": [2, 3]})
    launch_job(swept)
    runs = project / "runs" / "a b"
    (runs / "steps=2" / "result").write_text("kept")
    script = (runs / "steps=2" / "submit.slurm").stat().st_mtime_ns
    module = importlib.import_module(args.script)
    monkeypatch.setattr(
        module, "is_done", lambda run_args, world_size: run_args.steps == 2, raising=False
    )
    again = replace(swept, dirs_exists_ok=True)
    launch_job(again)
    assert launched == [[2, 3], [3]]
    assert (runs / "steps=2" / "submit.slurm").stat().st_mtime_ns == script
    assert "1 of 2 runs are done already" in capfd.readouterr().out
    launch_job(replace(again, sweep={"steps": [2]}))
    assert len(launched) == 2 and "nothing to do" in capfd.readouterr().out
