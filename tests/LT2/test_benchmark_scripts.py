"""Test the scripts around the benchmarks with a `python` that prints its arguments."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARRAY = ROOT / "apps/LT2/slurm/benchmark_prefill_array.slurm"
ALL = ROOT / "apps/LT2/scripts/benchmark_prefill_all.sh"
TRAIN_ALL = ROOT / "apps/LT2/scripts/benchmark_train_all.sh"
TRAIN_RECIPES = sorted(
    str(p.relative_to(ROOT)) for p in ROOT.glob("apps/LT2/configs/600M/*_600M.yaml")
)
RECIPES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("apps/LT2/configs/1B/*_1B.yaml"))
N_LENGTHS = 8  # 1k, 2k, ... 128k


@pytest.fixture
def run(tmp_path):
    """Run a script from the root of the repository; results go to tmp_path/out."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/bash\necho "$*" >> {tmp_path}/asked\necho a table\necho "{{}}"\n'
        'if [[ "$*" == *"$FAIL_ON"* ]]; then exit 1; fi\n'
    )
    python.chmod(0o755)

    def run(script: Path | str, *argv: str, **env: object) -> subprocess.CompletedProcess:
        known = {"PATH": f"{python.parent}:{os.environ['PATH']}", "FAIL_ON": "nothing"}
        return subprocess.run(
            ["bash", str(script), *argv],
            cwd=ROOT,
            env={**known, "OUT": str(tmp_path / "out"), **{k: str(v) for k, v in env.items()}},
            capture_output=True,
            text=True,
        )

    return run


def asked(tmp_path: Path) -> list[str]:
    file = tmp_path / "asked"
    return file.read_text().splitlines() if file.exists() else []


def test_the_array_has_a_task_for_every_1b_recipe_and_length():
    found = re.search(r"^#SBATCH --array=0-(\d+)$", ARRAY.read_text(), re.M)
    assert found is not None and int(found[1]) + 1 == len(RECIPES) * N_LENGTHS


def test_tasks_of_the_array_measure_each_pair_once(run, tmp_path):
    recipes = RECIPES[:2]
    env = {"RECIPES": " ".join(recipes), "LENGTHS": "16 32", "OPTIONS": "--batch-size 2"}
    for task in range(5):  # one more than there are points
        done = run(ARRAY, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT=5, **env)
        assert done.returncode == 0, done.stderr
    program = "-m apps.LT2.benchmark_prefill"
    assert asked(tmp_path) == [
        f"{program} --config {recipe} --seq-len {length} --batch-size 2"
        for recipe in recipes
        for length in (16, 32)
    ]
    results = sorted((tmp_path / "out").iterdir())
    assert len(results) == 4 and {file.read_text() for file in results} == {"{}\n"}


def test_an_array_that_is_too_small_is_refused(run, tmp_path):
    done = run(ARRAY, SLURM_ARRAY_TASK_ID=0, SLURM_ARRAY_TASK_COUNT=4)
    assert done.returncode == 2 and f"--array=0-{len(RECIPES) * N_LENGTHS - 1}" in done.stderr
    assert asked(tmp_path) == []


def test_a_failed_task_leaves_no_result(run, tmp_path):
    env = {"SLURM_ARRAY_TASK_ID": 0, "SLURM_ARRAY_TASK_COUNT": 999, "FAIL_ON": "benchmark"}
    assert run(ARRAY, **env).returncode != 0
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize(
    "script, recipes, command",
    [
        (ALL, RECIPES, "benchmark_prefill --config {} --seq-len 16 32 --repeats 3"),
        (TRAIN_ALL, TRAIN_RECIPES, "scripts.benchmark_train {} --repeats 3"),
    ],
)
def test_one_machine_measures_all_recipes_and_goes_on_after_a_failure(
    run, tmp_path, script, recipes, command
):
    done = run(script, "--repeats", "3", LENGTHS="16 32", FAIL_ON=recipes[1])
    assert done.returncode == 1 and f"failed: {recipes[1]}" in done.stderr
    *measured, drawn = asked(tmp_path)
    assert measured == [f"-m apps.LT2.{command.format(recipe)}" for recipe in recipes]
    assert "benchmark_report" in drawn and recipes[0].split("/")[-1][:-5] in drawn
    assert len(list((tmp_path / "out").glob("*.json"))) == len(recipes) - 1

    (tmp_path / "asked").unlink()
    log = tmp_path / "log"
    again = run("-c", f"bash {script} --repeats 3 > {log} 2>&1", LENGTHS="16 32")
    assert again.returncode == 0
    assert f"{Path(recipes[0]).stem}.json exists" in log.read_text()  # not truncated later
    assert len(asked(tmp_path)) == 2  # the one that failed, and the figure


@pytest.mark.parametrize("script, recipes", [(ALL, RECIPES), (TRAIN_ALL, TRAIN_RECIPES)])
def test_results_of_other_commands_are_not_reported(run, tmp_path, script, recipes):
    first, second = recipes[:2]
    stem = Path(first).stem
    assert run(script, "--steps=2", RECIPES=first, LENGTHS="16").returncode == 0
    n_asked = len(asked(tmp_path))
    for options, named, words in (
        (["--steps=4"], f"{second} {first}", f"{stem}.json has other options; use another OUT"),
        (["--steps=4"], second, f"{stem}.json has other options"),
        ([], second, f"{stem}.json has other options"),
        (["--steps=2"], f"{second} ./{first}", f"{stem}.json is not of ./{first}"),
        (["--steps=2"], f"{second} x/{Path(second).name}", f"more than one {Path(second).name}"),
    ):
        done = run(script, *options, RECIPES=named, LENGTHS="16")
        assert done.returncode == 2 and words in done.stderr
    assert len(asked(tmp_path)) == n_asked, "nothing ran"
    assert run(script, "--steps=2", RECIPES=second, LENGTHS="16").returncode == 0


def test_a_folder_that_cannot_be_made_is_an_error_before_any_run(run, tmp_path):
    (tmp_path / "file").touch()
    done = run(TRAIN_ALL, RECIPES=TRAIN_RECIPES[0], OUT=tmp_path / "file" / "out")
    assert done.returncode == 1 and asked(tmp_path) == []


def test_the_error_of_the_only_recipe_is_the_last_one(run, tmp_path):
    done = run(TRAIN_ALL, RECIPES=TRAIN_RECIPES[0], FAIL_ON="benchmark_train")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: no recipe could be measured"
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".command"]
