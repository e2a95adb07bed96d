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
    FORMATS,
    MORE_COLOURS,
    Line,
    draw_lines,
    format_length,
    import_pyplot,
    save_figure,
    set_plain_ticks,
)
from lingua.config.cli import OneLineParser
from lingua.errors import UserError, run_cli
from lingua.files.jsonl_log import read_jsonl_records
from lingua.files.lock import make_writable
from lingua.run_columns import short

LOOPS, LENGTH = "model.loop_count", "data.task.n"
BATCH_SIZE = 8  # of the decode panel
# The benchmark's configs, in its order, so that both figures of README have the same colours.
CONFIGS = {
    "looped_hybrid_gdn_4to1_1B": "hybrid",
    "looped_hybrid_gdn_dsa_1B": "gdn+dsa",
    "looped_pure_full_1B": "full",
    "looped_pure_gdn_1B": "gdn",
    "looped_pure_window_1B": "window",
}
COLOURS = dict(zip([*CONFIGS.values(), "mamba2", "kda"], MORE_COLOURS, strict=False))

Rows = Sequence[Mapping[str, Any]]


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Read results that have `fields`. UserError for another file, or none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name published results, such as docs/results")
    rows = list(read_jsonl_records(path))
    missing = [name for name in fields if any(name not in row for row in rows)]
    if missing or not rows:
        raise UserError(f"{path}: no results with {', '.join(missing or fields)}")
    return rows


# ---- the longest array


def longest_arrays(rows: Rows) -> dict[str, dict[int, list[tuple[int, bool]]]]:
    """Return n_max of each seed by arm and T, and whether it may be more.

    n_max is the largest n that passed, or 0. A chain whose last stage passed may reach more, unless
    no chain has a larger n.
    """
    longest = max(row[LENGTH] for row in rows)
    chains: dict[str, dict[int, dict[int, list[Mapping[str, Any]]]]] = {}
    for row in sorted(rows, key=lambda row: (row[LOOPS], row[LENGTH])):
        of_arm = chains.setdefault(row["arm"], {}).setdefault(row[LOOPS], {})
        of_arm.setdefault(row["seed"], []).append(row)
    return {
        arm: {
            T: sorted(
                (
                    max((r[LENGTH] for r in stages if r["passed"]), default=0),
                    stages[-1]["passed"] and stages[-1][LENGTH] < longest,
                )
                for stages in seeds.values()
            )
            for T, seeds in by_loops.items()
        }
        for arm, by_loops in chains.items()
    }


def format_cell(of_seeds: Sequence[tuple[int, bool]]) -> str:
    """Return the median of n_max, and below it the range over seeds if they differ."""
    texts = [f"{'≥' * is_open}{n}" for n, is_open in of_seeds]
    middle = texts[len(texts) // 2]
    return middle if texts[0] == texts[-1] else f"{middle}\n({texts[0]} to {texts[-1]})"


def draw_arrays(axes: Any, rows: Rows) -> None:
    """Draw a table: a row for each arm, a column for each T, coloured by the median of n_max."""
    import numpy as np

    arms = longest_arrays(rows)
    loops = sorted({T for by_loops in arms.values() for T in by_loops})
    cells = np.full((len(arms), len(loops)), np.nan)
    for i, by_loops in enumerate(arms.values()):
        for T, of_seeds in by_loops.items():
            j = loops.index(T)
            cells[i, j] = np.log2(max(of_seeds[len(of_seeds) // 2][0], 4))  # n starts at 8
            colour = "w" if cells[i, j] > 4.5 else "k"
            text = format_cell(of_seeds)
            axes.text(j, i, text, ha="center", va="center", color=colour, size=8)
    axes.imshow(cells, cmap="Blues", vmin=1.5, vmax=7, aspect="auto")
    axes.set_xticks(range(len(loops)), [f"T = {T}" for T in loops])
    axes.set_yticks(range(len(arms)), list(arms))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Longest array of bits in which the model\nfollows swapped pointers", loc="left")
    axes.set_xlabel("median (range) over seeds; white: not run")


# ---- loss and speed


def draw_losses(axes: Any, rows: Rows) -> None:
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        loops = sorted({row[LOOPS] for row in own})
        means = [statistics.fmean(r["bpb"] for r in own if r[LOOPS] == T) for T in loops]
        runs = [([row[LOOPS]], [row["bpb"]]) for row in own]
        lines.append(Line(loops, means, arm, COLOURS.get(arm, "k"), marker="o", runs=runs))
    lines.sort(key=lambda line: -line.y[-1])
    draw_lines(axes, lines)
    axes.set_xscale("log", base=2)
    set_plain_ticks(axes.xaxis, sorted({row[LOOPS] for row in rows}))
    axes.set_xlabel("loops T")
    axes.set_ylabel("bits per byte of held-out text")
    size = short(statistics.median(row["params"] for row in rows))
    axes.set_title(f"Loss of models with {size} parameters\nat equal training FLOPs", loc="left")
    axes.legend(frameon=False)


def draw_decode(axes: Any, rows: Rows) -> None:
    lines, ticks = [], sorted({row["seqlen"] for row in rows})
    for config, name in CONFIGS.items():
        own = [r for r in rows if (r["config"], r["batch_size"]) == (config, BATCH_SIZE)]
        speeds = {row["seqlen"]: row["decode"]["tokens_per_s"] for row in own}
        points = {n: speed for n, speed in sorted(speeds.items()) if speed is not None}
        if not points:
            continue
        line = Line(list(points), list(points.values()), name, COLOURS[name], marker="o")
        lines.append(line)
        missing = [n for n in sorted(speeds) if n not in points]
        axes.plot(missing, [line.y[-1]] * len(missing), "x", color=line.colour)
    draw_lines(axes, lines)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ticks, [format_length(n) for n in ticks])
    set_plain_ticks(axes.yaxis, [100 * 2**i for i in range(6)])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(f"tokens/s, {BATCH_SIZE} sequences together")
    axes.set_title("Decode speed of 1B models with T = 4\n(x: out of memory)", loc="left")
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
    if args.out.suffix not in FORMATS:
        raise UserError(f"--out {args.out} must end in {', '.join(FORMATS)}")
    chain = ["arm", LOOPS, LENGTH, "seed", "passed"]
    arrays = read_rows(args.results / "curriculum.jsonl", chain)
    losses = read_rows(args.results / "mixers.jsonl", ["arm", LOOPS, "bpb", "params"])
    speeds = read_rows(args.inference, ["config", "batch_size", "seqlen", "decode"])
    make_writable("--out", args.out.parent)
    pyplot = import_pyplot(needed_by="the figure")
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.6), dpi=150, layout="constrained")
    draw_arrays(axes[0], arrays)
    draw_losses(axes[1], losses)
    draw_decode(axes[2], speeds)
    save_figure(figure, args.out)
    pyplot.close(figure)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main)
