"""Plot results of benchmark_prefill: prefill, decode and cache against length.

    python -m apps.LT2.scripts.plot_benchmark runs/benchmark_prefill/*.json --out figure.png

A file contains the output of the benchmark, or only its last line (JSON). Each config is one line
in the figure, or one line per batch size. An x, at the height of the last point of its line, marks
a length that ran out of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.LT2.benchmark.inference_cost import OUT_OF_MEMORY
from apps.LT2.scripts.benchmark_results import PREFILL, read_results
from apps.LT2.scripts.figure import (
    MORE_COLOURS,
    format_length,
    import_pyplot,
    save_figure,
    set_plain_ticks,
)
from lingua.config.cli import OneLineParser
from lingua.errors import UserError, run_cli
from lingua.files.lock import make_writable

PANELS = {  # kind -> title, unit
    "prefill": ("Prefill", "tokens/s, all sequences"),
    "decode": ("Decode", "tokens/s, all sequences"),
    "cache": ("Cache of a sequence", "MiB"),
}
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")]  # for more lines than colours

Points = dict[str, dict[int, float]]  # line -> length -> tokens/s


def named_rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return each row with the name of its line, which has the batch size if there are several."""
    rows = [row for result in results for row in result["rows"]]
    several = len({row["batch_size"] for row in rows}) > 1
    return [
        (f"{row['config']}, batch {row['batch_size']}" if several else row["config"], row)
        for row in rows
    ]


def points(results: Sequence[dict[str, Any]], kind: str) -> Points:
    """Return tokens/s by line and length for `kind`, prefill or decode.

    If a point was measured twice, the later one counts.
    """
    lines: Points = {}
    for name, row in named_rows(results):
        line = lines.setdefault(name, {})
        if row[kind]["tokens_per_s"] is not None:
            line[row["seqlen"]] = row[kind]["tokens_per_s"]
    return lines


def cache_sizes(results: Sequence[dict[str, Any]]) -> Points:
    """Return the MiB of a sequence's cache by config and length."""
    lines: Points = {}
    for row in (row for result in results for row in result["rows"]):
        lines.setdefault(row["config"], {})[row["seqlen"]] = row["cache_mib"]
    return lines


def out_of_memory(results: Sequence[dict[str, Any]], kind: str) -> dict[str, list[int]]:
    """Return the lengths without memory for `kind` by line, named as in `points`."""
    found: dict[str, list[int]] = {}
    for name, row in named_rows(results):
        if row[kind].get("problem") == OUT_OF_MEMORY:
            found.setdefault(name, []).append(row["seqlen"])
    return found


def check_can_draw(out: Path) -> None:
    """Make the folder of the figure. UserError, before measuring, if it could not be written."""
    pyplot = import_pyplot(needed_by="plotting a benchmark")
    known = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close()
    if out.suffix.removeprefix(".") not in known:
        raise UserError(f"--plot {out}: use an image format, such as {out.with_suffix('.png')}")
    make_writable("--plot", out.parent)


def line_looks(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return colour, dashes and marker by line: a colour for each config, dashes by batch size."""
    rows = named_rows(results)
    configs = list(dict.fromkeys(row["config"] for _, row in rows))
    batches = list(dict.fromkeys(row["batch_size"] for _, row in rows))
    looks = {}
    for name, row in rows:
        colour = configs.index(row["config"])
        dashes = batches.index(row["batch_size"]) + colour // len(MORE_COLOURS)
        style, marker = STYLES[dashes % len(STYLES)]
        look = {"color": MORE_COLOURS[colour % len(MORE_COLOURS)], "marker": marker}
        looks[name] = {**look, "linestyle": style}
        looks.setdefault(row["config"], looks[name])  # of all batch sizes
    return looks


def legend_entries(
    results: Sequence[dict[str, Any]], looks: dict[str, dict[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    """Return label and look of each config, and of each batch size in grey if there are several."""
    rows = named_rows(results)
    entries = [(name, looks[name]) for name in dict.fromkeys(row["config"] for _, row in rows)]
    by_batch = {row["batch_size"]: looks[name] for name, row in reversed(rows)}
    if len(by_batch) > 1:
        entries += [(f"batch {n}", by_batch[n] | {"color": "grey"}) for n in sorted(by_batch)]
    return entries


def draw(results: Sequence[dict[str, Any]], out: Path) -> None:
    pyplot = import_pyplot(needed_by="plotting a benchmark")
    looks = line_looks(results)
    figure, all_axes = pyplot.subplots(1, 3, figsize=(12, 4.6), dpi=200, layout="constrained")
    for axes, kind in zip(all_axes, PANELS, strict=True):
        title, unit = PANELS[kind]
        lines = cache_sizes(results) if kind == "cache" else points(results, kind)
        missing = {} if kind == "cache" else out_of_memory(results, kind)
        for name, line in lines.items():
            look, lengths = looks[name], sorted(line)
            axes.plot(lengths, [line[n] for n in lengths], label=name, markersize=4, **look)
            for n in missing.get(name, []) if line else []:
                axes.plot(n, line[lengths[-1]], "x", color=look["color"], markersize=7)
        ticks = sorted({row["seqlen"] for _, row in named_rows(results)})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [format_length(n) for n in ticks])
        set_plain_ticks(axes.yaxis)
        axes.set_xlabel("length (tokens)")
        axes.set_ylabel(unit)
        axes.set_title(f"{title} (x: out of memory)" if missing else title, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    devices = sorted({f"{result['device']}, {result['dtype']}" for result in results})
    figure.suptitle("; ".join(devices), fontsize=9)
    entries = legend_entries(results, looks)
    handles = [pyplot.Line2D([], [], label=label, **look) for label, look in entries]
    n_columns = min(len(handles), 4)
    figure.legend(handles=handles, loc="outside lower center", ncols=n_columns, frameon=False)
    save_figure(figure, out)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="python -m apps.LT2.scripts.plot_benchmark",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="figure to write")
    args = parser.parse_args(argv)
    _, results = read_results(args.results, [PREFILL])
    draw(results, args.out)
    print(f"{sum(len(result['rows']) for result in results)} rows: {args.out}")


if __name__ == "__main__":
    run_cli(main)
