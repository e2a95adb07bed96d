"""The figure of README.md."""

from __future__ import annotations

import pytest

from apps.LT2.scripts.plot_summary import longest_arrays, main, read_rows
from lingua.errors import UserError
from tests.readme import ROOT

RESULTS = ROOT / "docs" / "results"
INFERENCE = ROOT / "docs" / "benchmarks" / "inference_1b_h200_20261130.jsonl"


def test_the_figure_is_drawn_from_published_results(tmp_path, capsys):
    out = tmp_path / "summary.png"
    main([str(RESULTS), str(INFERENCE), "--out", str(out)])
    assert out.stat().st_size > 50_000 and str(out) in capsys.readouterr().out


def test_n_max_is_the_last_stage_that_passed():
    def row(seed: int, n: int, passed: bool, T: int = 4):
        chain = {"arm": "gdn", "model.loop_count": T, "seed": seed}
        return {**chain, "data.task.n": n, "passed": passed}

    rows = [row(1, 8, True), row(1, 16, True), row(1, 32, False), row(2, 8, True)]
    rows += [row(2, 16, False), row(1, 8, False, T=1)]
    assert longest_arrays(rows) == {"gdn": {1: [0], 4: [8, 16]}}


@pytest.mark.parametrize("name", ["mixers.jsonl", "missing.jsonl"])
def test_a_file_without_results_is_one_line(name):
    with pytest.raises(UserError, match=f"{name}: no results with 'passed'; name a published"):
        read_rows(RESULTS / name, "passed")
