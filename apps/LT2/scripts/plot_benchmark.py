"""Plot results of benchmark_prefill: tokens/s of prefill and decode against length.

    python -m apps.LT2.scripts.plot_benchmark runs/benchmark_prefill/*.json --out figure.png

A file contains the output of the benchmark, or only its last line (JSON). Each config is one line
in the figure, or one line per batch size. Points that ran out of memory are missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.LT2.scripts.figure import COLOURS, import_pyplot, save_figure
from lingua.config.cli import OneLineParser
from lingua.errors import UserError, run_cli

PANELS = {"prefill": "Prefill", "decode": "Decode"}
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")]  # for more lines than colours

Points = dict[str, dict[int, float]]  # line -> length -> tokens/s


def read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, IndexError, ValueError) as error:
        raise UserError(f"{path}: the last line is not readable as JSON: {error}") from None
    if "rows" not in result:
        raise UserError(f"{path}: the last line is not a result of apps.LT2.benchmark_prefill")
    return result


def points(results: Sequence[dict[str, Any]], kind: str) -> Points:
    """Return tokens/s by line and length for `kind`, prefill or decode.

    If a point was measured twice, the later one counts.
    """
    rows = [row for result in results for row in result["rows"]]
    several = len({row["batch_size"] for row in rows}) > 1
    lines: Points = {}
    for row in rows:
        name = f"{row['config']}, batch {row['batch_size']}" if several else row["config"]
        line = lines.setdefault(name, {})
        if row[kind]["tokens_per_s"] is not None:
            line[row["seqlen"]] = row[kind]["tokens_per_s"]
    return lines


def check_can_draw(out: Path) -> None:
    """Raise UserError, before measuring, if the figure could not be written."""
    pyplot = import_pyplot(needed_by="plotting a benchmark")
    known = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close()
    if out.suffix.removeprefix(".") not in known:
        raise UserError(f"--plot {out}: use an image format, such as {out.with_suffix('.png')}")
    if not out.parent.is_dir():
        raise UserError(f"--plot {out}: the folder {out.parent} does not exist")


def draw(results: Sequence[dict[str, Any]], out: Path) -> None:
    pyplot = import_pyplot(needed_by="plotting a benchmark")
    figure, all_axes = pyplot.subplots(1, 2, figsize=(12, 5), dpi=150, layout="constrained")
    for axes, (kind, title) in zip(all_axes, PANELS.items(), strict=True):
        lines = points(results, kind)
        for i, (name, line) in enumerate(lines.items()):
            style, marker = STYLES[i // len(COLOURS) % len(STYLES)]
            lengths = sorted(line)
            axes.plot(
                lengths,
                [line[n] for n in lengths],
                color=COLOURS[i % len(COLOURS)],
                linestyle=style,
                marker=marker,
                markersize=4,
                label=name,
            )
        ticks = sorted({n for line in lines.values() for n in line})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [format_length(n) for n in ticks])
        axes.set_xlabel("length (tokens)")
        axes.set_ylabel("tokens/s, all sequences")
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    devices = sorted({f"{result['device']}, {result['dtype']}" for result in results})
    figure.suptitle("; ".join(devices), fontsize=9)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_figure(figure, out)
    pyplot.close(figure)


def format_length(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def main(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="python -m apps.LT2.scripts.plot_benchmark",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="figure to write")
    args = parser.parse_args(argv)
    results = [read_result(path) for path in args.results]
    draw(results, args.out)
    print(f"{sum(len(result['rows']) for result in results)} rows: {args.out}")


if __name__ == "__main__":
    run_cli(main)
