"""Draw README's figure of published results: what loops and mixers give, and what they cost.

    python -m apps.LT2.scripts.plot_summary docs/results \
        docs/benchmarks/inference_1b_h200_20261130.jsonl --out docs/results/summary.png

It reads curriculum.jsonl and mixers.jsonl of the folder, and rows of benchmark_prefill.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.LT2.scripts.figure import (
    COLOURS,
    Line,
    draw_lines,
    import_pyplot,
    save_figure,
    set_plain_ticks,
)
from apps.LT2.scripts.plot_benchmark import format_length
from lingua.config.cli import OneLineParser
from lingua.errors import UserError, run_cli
from lingua.files.jsonl_log import read_jsonl_records

LOOPS, LENGTH = "model.loop_count", "data.task.n"
BATCH_SIZE = 8  # of the decode panel
# Names and colours of the models in the other panels.
MODELS = {
    "full": COLOURS[0],
    "gdn": COLOURS[1],
    "hybrid": COLOURS[2],
    "window": COLOURS[3],
    "mamba2": COLOURS[4],
    "kda": COLOURS[5],
    "gdn+dsa": "k",
}
CONFIGS = {
    "looped_pure_full_1B": "full",
    "looped_pure_window_1B": "window",
    "looped_pure_gdn_1B": "gdn",
    "looped_hybrid_gdn_4to1_1B": "hybrid",
    "looped_hybrid_gdn_dsa_1B": "gdn+dsa",
}

Rows = Sequence[Mapping[str, Any]]


def read_rows(path: Path, field: str) -> list[dict[str, Any]]:
    rows = list(read_jsonl_records(path)) if path.is_file() else []
    if not rows or field not in rows[0]:
        raise UserError(f"{path}: no results with {field!r}; name a published .jsonl file")
    return rows


def longest_arrays(rows: Rows) -> dict[str, dict[int, list[int]]]:
    """Return n_max of each seed by arm and T: the largest n that passed, or 0."""
    found: dict[str, dict[int, dict[int, int]]] = {}
    for row in rows:
        seeds = found.setdefault(row["arm"], {}).setdefault(row[LOOPS], {})
        n = row[LENGTH] if row["passed"] else 0
        seeds[row["seed"]] = max(n, seeds.get(row["seed"], 0))
    return {
        arm: {T: sorted(seeds.values()) for T, seeds in sorted(by_loops.items())}
        for arm, by_loops in found.items()
    }


def draw_arrays(axes: Any, rows: Rows) -> None:
    """Draw a table: a row for each arm, a column for each T, coloured by the median of n_max."""
    import numpy as np

    arms = longest_arrays(rows)
    loops = sorted({T for by_loops in arms.values() for T in by_loops})
    cells = np.full((len(arms), len(loops)), np.nan)
    for i, by_loops in enumerate(arms.values()):
        for T, of_seeds in by_loops.items():
            middle, j = statistics.median(of_seeds), loops.index(T)
            cells[i, j] = np.log2(max(middle, 4))  # n starts at 8
            least, most = of_seeds[0], of_seeds[-1]
            text = f"{middle:g}" if least == most else f"{middle:g}\n({least}-{most})"
            dark = cells[i, j] > 4.5
            axes.text(j, i, text, ha="center", va="center", color="w" if dark else "k", size=8)
    axes.imshow(cells, cmap="Blues", vmin=1.5, vmax=7, aspect="auto")
    axes.set_xticks(range(len(loops)), [f"T = {T}" for T in loops])
    axes.set_yticks(range(len(arms)), list(arms))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Longest array of bits followed\nthrough swaps of pointers", loc="left")


def draw_losses(axes: Any, rows: Rows) -> None:
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        loops = sorted({row[LOOPS] for row in own})
        means = [statistics.fmean(r["bpb"] for r in own if r[LOOPS] == T) for T in loops]
        runs = [([row[LOOPS]], [row["bpb"]]) for row in own]
        lines.append(Line(loops, means, arm, MODELS.get(arm, "k"), marker="o", runs=runs))
    lines.sort(key=lambda line: -line.y[-1])
    draw_lines(axes, lines)
    axes.set_xscale("log", base=2)
    set_plain_ticks(axes.xaxis, sorted({row[LOOPS] for row in rows}))
    axes.set_xlabel("loops T")
    axes.set_ylabel("bits per byte of held-out text")
    axes.set_title("Loss of 17M models\nat equal training FLOPs", loc="left")
    axes.legend(frameon=False)


def draw_decode(axes: Any, rows: Rows) -> None:
    lines = []
    for config, name in CONFIGS.items():
        points = {
            row["seqlen"]: row["decode"]["tokens_per_s"]
            for row in rows
            if (row["config"], row["batch_size"]) == (config, BATCH_SIZE)
            and row["decode"]["tokens_per_s"] is not None
        }
        lengths = sorted(points)
        speeds = [points[n] for n in lengths]
        lines.append(Line(lengths, speeds, name, MODELS[name], marker="o"))
    draw_lines(axes, lines)
    ticks = sorted({n for line in lines for n in line.x})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [format_length(int(n)) for n in ticks])
    set_plain_ticks(axes.yaxis)
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(f"tokens/s of {BATCH_SIZE} sequences")
    axes.set_title("Decode speed of 1B models\nwith T = 4 on one H200", loc="left")
    axes.legend(frameon=False, loc="lower left")


def main(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="python -m apps.LT2.scripts.plot_summary",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("results", type=Path, metavar="FOLDER", help="with the .jsonl of studies")
    parser.add_argument("inference", type=Path, metavar="INFERENCE.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="figure to write")
    args = parser.parse_args(argv)
    arrays = read_rows(args.results / "curriculum.jsonl", "passed")
    losses = read_rows(args.results / "mixers.jsonl", "bpb")
    speeds = read_rows(args.inference, "decode")
    pyplot = import_pyplot(needed_by="the figure")
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.4), dpi=150, layout="constrained")
    draw_arrays(axes[0], arrays)
    draw_losses(axes[1], losses)
    draw_decode(axes[2], speeds)
    save_figure(figure, args.out)
    pyplot.close(figure)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main)
