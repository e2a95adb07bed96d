"""Report results of benchmark_train: tokens/s relative to a reference, memory, kernels, a figure.

A row is a recipe with its --vary options and with the overrides that not all files share. The
reference is one recipe. Each row is compared with the reference at the same sequence length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from apps.LT2.scripts.benchmark_results import TRAIN, format_facts, write_files
from apps.LT2.scripts.benchmark_train import Row
from apps.LT2.scripts.figure import (
    COLOURS,
    LABEL_SIZE,
    import_pyplot,
    save_figure,
    set_plain_ticks,
)
from lingua.args import print_text
from lingua.errors import UserError
from lingua.run_columns import Column
from lingua.run_table import Table, format_as
from lingua.runs import list_names, only

DEFAULT_REFERENCE = "pure_full"  # part of a name
HAVE_COLUMNS = ("data.seq_len=", "data.batch_size=")
IF_DIFFERENT = ("sequence", "batch", "ranks")  # columns
# In a narrow terminal the column with the highest rank is dropped first.
RANKS = {"body": 4, "1st step": 3, "quartiles": 2, "memory": 1}

Line = dict[str, Any]  # a row of a result


def named_rows(results: Sequence[dict[str, Any]]) -> list[Line]:
    """Return copies of all rows, whose names have the overrides that not all results share."""
    given = [result.get("overrides", []) for result in results]
    shared = set.intersection(*map(set, given))
    rows = []
    for result, overrides in zip(results, given, strict=True):
        own = [o for o in overrides if o not in shared and not o.startswith(HAVE_COLUMNS)]
        for row in result["rows"]:
            name = " ".join([row["recipe"], *own])
            rows.append(asdict(Row("")) | row | {"recipe": name})  # older results lack fields
    return rows


def compare(rows: Sequence[Line], wanted: str | None) -> str:
    """Add `ratio` and `is_reference` to the rows. Return the name of the reference.

    The name is "" if no row was measured. UserError if `wanted` is not a name or part of one name.
    """
    names = list(dict.fromkeys(row["recipe"] for row in rows if not row["problem"]))
    if wanted is None:
        name = next((n for n in names if DEFAULT_REFERENCE in n), names[0] if names else "")
    else:
        found = [n for n in names if n == wanted] or [n for n in names if wanted in n]
        if not found:
            raise UserError(
                f"--reference {wanted}: no measured row has this name; use one of "
                f"{list_names(names, 20) or '(no row was measured)'}"
            )
        name = only("--reference", wanted, found)
    of_length: dict[int, Line] = {}
    for row in rows:
        if row["recipe"] == name and not row["problem"]:
            of_length.setdefault(row["seq_len"], row)
    for row in rows:
        reference = of_length.get(row["seq_len"])
        row["is_reference"] = row is reference
        row["ratio"] = None
        if reference is not None and not row["problem"]:
            row["ratio"] = row["tokens_per_s"] / reference["tokens_per_s"]
    return name


def outcome(row: Line) -> str:
    if not row["problem"]:
        return f"{row['tokens_per_s']:,.0f}"
    return "OOM" if row["problem"].startswith("out of memory") else "failed"


# ---- tables


def make_table(lines: Sequence[dict[str, str | None]]) -> Table:
    """Make a table of cells by column, without empty columns."""
    columns = []
    for i, head in enumerate(lines[0]):
        cells = [line[head] for line in lines]
        if any(cells) and not (head in IF_DIFFERENT and len(set(cells)) == 1):
            columns.append(Column(head, str, str, RANKS.get(head, 0), least=0 if i else 28))
            columns[-1].cells = cells
    return Table([], columns)


def speed_cells(row: Line) -> dict[str, str | None]:
    low, high = row["quartiles"]
    late, breaks, mfu = (row[name] for name in ("late_graphs", "graph_breaks", "mfu"))
    return {
        "recipe": row["recipe"],
        "sequence": str(row["seq_len"]),
        "batch": str(row["batch_size"]),
        "ranks": str(row["n_ranks"]),
        "body": f"{row['body_parameters'] / 1e6:.1f}M" if row["body_parameters"] else None,
        "tok/s": outcome(row),
        "quartiles": f"{low:,.0f}-{high:,.0f}" if high else None,
        "ratio": f"{row['ratio']:.3f}" if row["ratio"] else None,
        "MFU": None if mfu is None else f"{100 * mfu:.1f}%",
        "memory": f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] else None,
        "1st step": f"{row['first_step_s']:.1f} s" if row["first_step_s"] else None,
        "breaks": str(breaks) if breaks else None,
        "late graphs": str(late) if late else None,
    }


def kernel_lines(rows: Sequence[Line]) -> list[dict[str, str | None]]:
    """Return the cells of traced rows: ms of a step, of all kernels, and of each kind of kernel."""
    traced = [row for row in rows if row["kernel_ms"]]
    total: Counter[str] = Counter()
    for row in traced:
        total.update(row["kernel_ms"])
    kinds = [kind for kind, _ in total.most_common()]
    lines = []
    for row in traced:
        step = 1000 * row["tokens_per_step"] / row["tokens_per_s"]
        ms = {"step": step, "all kernels": sum(row["kernel_ms"].values())}
        ms |= {kind: row["kernel_ms"].get(kind, 0.0) for kind in kinds}
        cells = speed_cells(row)
        names = {head: cells[head] for head in ("recipe", *IF_DIFFERENT)}
        lines.append(names | {kind: f"{value:,.1f}" for kind, value in ms.items()})
    return lines


# ---- figure


def draw_speeds(rows: Sequence[Line], device: str, out: Path) -> None:
    """Draw tokens/s as bars with quartiles, in a panel for each sequence length."""
    pyplot = import_pyplot(needed_by="plotting a benchmark")
    panels = [list(group) for _, group in groupby(rows, key=lambda row: row["seq_len"])]
    figure, all_axes = pyplot.subplots(
        *(len(panels), 1),
        **{"sharex": True, "squeeze": False, "dpi": 150, "layout": "constrained"},
        figsize=(10, 0.9 + 0.45 * len(panels) + 0.27 * len(rows)),
        height_ratios=[len(panel) + 0.5 for panel in panels],
    )
    for axes, panel in zip(all_axes[:, 0], panels, strict=True):
        rates, places = [row["tokens_per_s"] for row in panel], range(len(panel))
        lows, highs = zip(*(row["quartiles"] for row in panel), strict=True)
        pairs = (zip(rates, lows, strict=True), zip(highs, rates, strict=True))
        whiskers = [[a - b for a, b in pair] for pair in pairs]
        colours = [COLOURS[1] if row["is_reference"] else COLOURS[0] for row in panel]
        axes.barh(places, rates, 0.7, xerr=whiskers, color=colours, ecolor=COLOURS[5], capsize=3)
        for i, row in enumerate(panel):
            note = f" ({row['ratio']:.2f})" if row["ratio"] else ""
            place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.annotate(outcome(row) + note, (highs[i], i), fontsize=LABEL_SIZE, **place)
            if row["is_reference"]:
                axes.axvline(rates[i], color=COLOURS[1], linestyle=":", linewidth=1, zorder=0)
        batches = [
            f", micro-batch {row['batch_size']}"
            + f", {row['n_ranks']} ranks" * (row["n_ranks"] > 1)
            for row in panel
        ]
        is_same = len(set(batches)) == 1
        labels = [r["recipe"] + b * (not is_same) for r, b in zip(panel, batches, strict=True)]
        axes.set_yticks(places, labels, fontsize=LABEL_SIZE)
        axes.invert_yaxis()
        axes.margins(x=0.15, y=0.02)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if panel[0].get("seq_len"):
            title = f"sequence {panel[0]['seq_len']}{batches[0] * is_same}"
            axes.set_title(title, loc="left", fontsize=9)
    all_axes[-1, 0].set_xlabel("tokens/s, median and quartiles (ratio to the reference)")
    set_plain_ticks(all_axes[-1, 0].xaxis)
    figure.suptitle(device, fontsize=9)
    save_figure(figure, out)
    pyplot.close(figure)


# ---- the report


def write_train_report(results: Sequence[dict[str, Any]], reference: str | None, out: Path) -> None:
    """Write the report, its figure and its data, and print the table."""
    rows = named_rows(results)
    name = compare(rows, reference)
    rows.sort(key=lambda r: (r["seq_len"], bool(r["problem"]), -r["tokens_per_s"]))
    table, kernels = make_table([speed_cells(row) for row in rows]), kernel_lines(rows)
    print_text(format_as(table, "table"))
    rule = (
        f"tok/s: tokens/s of all ranks, median of the timed steps. Ratio: relative to `{name}` at "
        "the same length. Batch: micro-batch of a rank. Body: parameters without embeddings. "
        "Memory: peak of a step, maximum over ranks. 1st step: with tuning and compilation."
    )
    traced = "Time of a step and of its kernels by kind, in ms. Kernels of streams may overlap."
    ran = [row for row in rows if not row["problem"]]
    facts = {
        "Steps": {
            f"{r['steps']}, the first {r['warmup']} not timed" for r in results if "steps" in r
        },
        "Ranks": {str(row["n_ranks"]) for row in ran},
        "Blocks": {"compiled" if row["compiled"] else "eager" for row in ran},
        "Sequence": {str(row["seq_len"]) for row in rows if row["seq_len"]},
        "Micro-batch": {str(row["batch_size"]) for row in rows if row["batch_size"]},
        "Failed": {
            f"{row['recipe']} at {row['seq_len']}: {row['problem']}"
            for row in rows
            if row["problem"]
        },
    }
    after = [
        *([traced, format_as(make_table(kernels), "markdown")] if kernels else []),
        format_facts(TRAIN, results, facts),
    ]
    before = [f"# {out.stem}: speed of training", rule, format_as(table, "markdown")]
    device = "; ".join(sorted({result["device"] for result in results}))
    write_files(out, rows, lambda figure: draw_speeds(rows, device, figure), before, after)
