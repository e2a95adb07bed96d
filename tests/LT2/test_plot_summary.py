"""The figure of README.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.LT2.scripts.plot_summary import format_cell, longest_arrays, main
from lingua.errors import UserError
from tests.readme import ROOT

RESULTS = ROOT / "docs" / "results"
INFERENCE = ROOT / "docs" / "benchmarks" / "inference_1b_h200_20261130.jsonl"


def test_the_figure_is_drawn_from_published_results(tmp_path, capsys):
    out = tmp_path / "new" / "summary.png"
    main([str(RESULTS), str(INFERENCE), "--out", str(out)])
    assert out.stat().st_size > 50_000 and str(out) in capsys.readouterr().out


def row(seed: int, n: int, passed: bool, T: int = 4):
    chain = {"arm": "gdn", "model.loop_count": T, "seed": seed}
    return {**chain, "data.task.n": n, "passed": passed}


def test_n_max_is_the_last_stage_that_passed():
    rows = [row(1, 16, True), row(1, 8, True), row(1, 32, False), row(2, 8, True)]
    rows += [row(2, 16, False), row(3, 8, True), row(3, 16, True), row(1, 8, False, T=1)]
    found = longest_arrays(rows)
    # Seed 3 was not asked for 32.
    assert found == {"gdn": {1: [(0, False)], 4: [(8, False), (16, False), (16, True)]}}
    assert format_cell(found["gdn"][1]) == "0"
    assert format_cell(found["gdn"][4]) == "16\n(8 to ≥16)"
    passed_all = longest_arrays([row(1, 8, True), row(1, 16, True)])
    assert passed_all == {"gdn": {4: [(16, False)]}}


@pytest.mark.parametrize(
    "results, inference, out, message",
    [
        (ROOT, INFERENCE, "a.png", "curriculum.jsonl: no such file; name published results"),
        (RESULTS, RESULTS / "mixers.jsonl", "a.png", "mixers.jsonl: no results with config, "),
        (RESULTS, INFERENCE, "a.txt", "--out .*a.txt must end in .png"),
        (RESULTS, INFERENCE, "", "--out .* must end in .png"),
    ],
)
def test_mistakes_are_one_line(tmp_path, results: Path, inference: Path, out: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        main([str(results), str(inference), "--out", str(tmp_path / out)])
    assert "\n" not in str(caught.value)
