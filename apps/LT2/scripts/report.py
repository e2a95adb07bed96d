"""Write one HTML page about a run, or about all runs in a folder.

    python -m apps.LT2.scripts.report runs/demo                # runs/demo/report.html
    python -m apps.LT2.scripts.report runs/tune out=tune.html  # a sweep: table, curves, every run
    python -m apps.LT2.scripts.report runs/demo prompts='["The function returns"]'

The page contains its style and plots, and opens from disk. Runs may still be training.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.scripts.figure import COLOURS, MAX_LABELS, MORE_COLOURS, Line, import_pyplot, smooth
from apps.LT2.scripts.plot import PlotArgs, as_lines, draw
from apps.LT2.scripts.plot_series import Series, curve
from apps.LT2.scripts.report_data import (
    environment,
    evaluations,
    layout,
    main_numbers,
    recorded_answers,
    resume_command,
    status,
    trained,
    values_of,
)
from apps.LT2.scripts.run_metrics import AXES
from lingua.args import parse_args
from lingua.config.cli import split_paths
from lingua.errors import UserError, import_optional, run_cli
from lingua.files.atomic import write_atomic
from lingua.files.lock import make_writable
from lingua.run_table import build_table
from lingua.runs import STEP, Run, differing_options, grouped, implied_options, read_runs

TEMPLATE = "report.html.jinja"
INK = "#010203"  # of text and axes in a plot; becomes the colour of the page's text
SIZE = [5.4, 3.1]  # inches of a plot
MAX_PLOTTED = 16  # runs of a page that have their own plots, which take about a second a run
CURVES = {
    "optim/lr": "Learning rate",
    "optim/grad_norm": "Gradient norm before clipping",
    "speed/tokens_per_s": "Training tokens/s",
    "speed/mfu": "Model FLOPs utilization",
    "loss/dsa_indexer": "Loss of the DSA indexer",
}
LOG_SCALE = ("optim/grad_norm",)  # if its values span a decade
OVERLAID = (  # x, y, title
    (STEP, "loss/out", "Training loss, smoothed"),
    (STEP, "loss/val", "Validation loss"),
    (AXES["flops"], "loss/val", "Validation loss over FLOPs"),
    (STEP, "speed/tokens_per_s", "Training tokens/s, smoothed"),
)
PROBED = re.compile(r"((?:loops|layers)/\w+)/(\d+)")
PROBES = {
    "loops/residual_rms": "RMS of the residual stream after the loop",
    "loops/update_norm": "Norm of the loop's update, relative to the stream",
    "loops/rho": "Residual gate, mean |rho|",
    "loops/first_token_mass": "Attention on the first token",
    "loops/exit": "Probability of leaving after the loop",
    "layers/grad_norm": "Gradient norm of the layer",
}


@dataclass
class ReportArgs:
    out: str | None = None  # .html; null: report.html in the folder of the run, or of the runs
    prompts: list[str] | None = None  # texts that the newest checkpoint of the run continues
    generator: PackedCausalTransformerGeneratorArgs = field(
        default_factory=lambda: PackedCausalTransformerGeneratorArgs(
            temperature=0.7, max_gen_len=64
        )
    )


# ---- plots


def svg(lines: list[Line], x: str, y: str, title: str, *, logy: bool = False) -> str:
    """Draw lines as an SVG element for the page. Text and axes take the colour of its text."""
    pyplot = import_pyplot(needed_by="the report")
    style = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    style |= {
        "svg.fonttype": "none",
        "font.size": 9,
        "grid.color": "#808080",
    }
    text = io.StringIO()
    with pyplot.rc_context(style):
        figure = draw(lines, x, y, PlotArgs(size=SIZE, logy=logy), title)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
        pyplot.close(figure)
    return tidy_svg(text.getvalue())


def tidy_svg(text: str) -> str:
    """Strip from matplotlib's SVG what a page must not repeat: prologue, size, font, unused ids."""
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "sans-serif", text)
    return text.replace("xlink:href", "href")


def one_line(
    run: Run, key: str, label: str | None = None, colour: str = COLOURS[0], *, smoothed: bool = True
) -> Line | None:
    """Return the finite values of a metric over steps, or None if it has none."""
    values = values_of(run, key)
    x, y = list(map(float, values)), list(values.values())
    mean = smooth(y) if smoothed else y
    return Line(x, mean, label, colour, raw=y if mean != y else None) if x else None


def run_plots(run: Run) -> list[str]:
    """Plot the losses, and each of CURVES that the run has."""
    training = one_line(run, "loss/out", "training")
    validation = one_line(run, "loss/val", "validation", COLOURS[1], smoothed=False)
    if validation:
        validation.marker = "o"
    plots = []
    if losses := [line for line in (training, validation) if line]:
        plots.append(svg(losses, STEP, "nats per token", "Loss"))
    for key, title in CURVES.items():
        if line := one_line(run, key, smoothed=key != "optim/lr"):
            logy = key in LOG_SCALE and spans_decade([line])
            plots.append(svg([line], STEP, "", title, logy=logy))
    return plots


def spans_decade(lines: Sequence[Line]) -> bool:
    values = [v for line in lines for v in line.raw or line.y]
    return min(values) > 0 and max(values) > 10 * min(values)


# ---- probes


def probed(run: Run, stat: str) -> list[int]:
    """Return the loops or layers that have the statistic."""
    matches = map(PROBED.fullmatch, run.metrics)
    return sorted(int(match[2]) for match in matches if match and match[1] == stat)


def probe_plots(run: Run) -> list[str]:
    """Plot each statistic of loops or layers, one line a loop or layer."""
    plots = []
    for stat, title in PROBES.items():
        numbers = probed(run, stat)
        name = "loop" if stat.startswith("loops/") else "layer"
        every = -(-len(numbers) // MAX_LABELS)  # every so many have a label
        lines = []
        for i in numbers:
            label = f"{name} {i}" if i % every == 0 else None
            colour = ordered_colour(i, len(numbers))
            line = one_line(run, f"{stat}/{i}", label, colour, smoothed=False)
            if line and len(line.x) > 1:
                lines.append(line)
        if lines:
            plots.append(svg(lines, STEP, "", title, logy=spans_decade(lines)))
    return plots


def ordered_colour(i: int, n: int) -> str:
    """Return a colour for the i-th of n loops or layers; many get a scale instead of hues."""
    if n <= MAX_LABELS:
        return MORE_COLOURS[i]
    matplotlib = import_optional("matplotlib", extra="plot", needed_by="the report")
    scale = matplotlib.colormaps["viridis"](0.1 + 0.75 * i / (n - 1))
    return matplotlib.colors.to_hex(scale)


def probe_table(run: Run) -> dict[str, Any] | None:
    """Return the newest statistics by loop, or None without any."""
    loops = probed(run, "loops/residual_rms")
    if not loops:
        return None
    step = max(run.metrics["loops/residual_rms/0"])
    rows = []
    for stat, title in PROBES.items():
        values = [run.metrics.get(f"{stat}/{i}", {}).get(step) for i in loops]
        if stat.startswith("loops/") and probed(run, stat):
            rows.append((title, values))
    return {"step": step, "loops": loops, "rows": rows}


# ---- the page


def section(run: Run, generated: Sequence[Any], *, with_plots: bool) -> dict[str, Any]:
    """Return everything that the template shows of one run."""
    numbers, missing = main_numbers(run)
    config = run.path / "config.yaml"
    return {
        "name": run.name,
        "status": status(run),
        "numbers": numbers,
        "missing": missing,
        "trained": trained(run),
        "layout": layout(run),
        "plots": run_plots(run) if with_plots else None,
        "probe_plots": probe_plots(run) if with_plots else [],
        "probe_table": probe_table(run),
        "answers": recorded_answers(run),
        "generated": generated,
        "evaluations": evaluations(run),
        "environment": environment(run),
        "resume": resume_command(run),
        "is_finished": run.status == "finished",
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
    }


def overview_table(
    runs: list[Run],
) -> tuple[list[tuple[str, bool]], list[tuple[Run, list[str]]]]:
    """Return the heads of lingua.sweep's table, and which are numbers; and its rows, by run."""
    names, *columns = build_table(runs, is_named=True).columns
    by_name = {run.name: run for run in runs}
    if len({name.text for name in names.cells}) > 1:  # else the options tell the runs apart
        columns.insert(0, names)
    heads = [(column.header or column.name, not column.least) for column in columns]
    texts = zip(*([column.text(cell) for cell in column.cells] for column in columns), strict=True)
    ordered = [by_name[name.value] for name in names.cells]
    return heads, list(zip(ordered, map(list, texts), strict=True))


def overlaid_plots(runs: list[Run]) -> list[str]:
    """Plot metrics of all runs, one line a run, which has one colour in all plots."""
    differing = differing_options(runs)
    implied = implied_options(runs, differing)
    groups = grouped(runs, [option for option in differing if option not in implied])
    ordered = [(options, run) for options, members in groups for run in members]
    empty = [Series(options, run.name, [], []) for options, run in ordered]
    plots = []
    for x, y, title in OVERLAID:
        lines = []
        for line, (_, run) in zip(as_lines(empty, [], True), ordered, strict=True):
            if y in run.metrics and (x == STEP or x in run.metrics):
                line.x, line.y = curve(run, x, y)
                line.y = line.y if y == "loss/val" else smooth(line.y)
                lines += [line] if line.x else []
        if any(len(line.x) > 1 for line in lines):
            plots.append(svg(lines, x, y, title))
    return plots


def generate_answers(run: Run, prompts: list[str], args: Any) -> list[dict[str, str]]:
    """Continue the prompts with the newest checkpoint of the run."""
    model, tokenizer, config = load_model_and_tokenizer(
        str(run.path), dtype=args.dtype, device=args.device
    )
    add_bos = config["data"].get("add_bos", True)
    generator = PackedCausalTransformerGenerator(args, model, tokenizer, add_bos=add_bos)
    answers = zip(prompts, generator.complete(prompts, score=False), strict=True)
    return [{"prompt": prompt, "answer": done.text, "note": ""} for prompt, done in answers]


def render(**content: Any) -> str:
    jinja2 = import_optional("jinja2", extra="plot", needed_by="the report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(TEMPLATE).render(made=made, **content)


def main(argv: list[str]) -> None:
    folders, options = split_paths(argv)
    prog = "python -m apps.LT2.scripts.report RUN"
    args = parse_args(ReportArgs, options, prog=prog, doc=__doc__)
    if not folders:
        raise UserError("no run given; name a run's dump_dir, or a folder of runs")
    runs = read_runs(folders)
    if not any(run.metrics for run in runs):
        raise UserError(f"{', '.join(map(str, folders))}: no run has a record in metrics.jsonl yet")
    is_folder = len(folders) == 1 and folders[0].is_dir()
    if args.out is None and not is_folder:
        raise UserError("out= is needed for several folders, e.g. out=report.html")
    out = Path(args.out) if args.out else folders[0] / "report.html"
    if out.suffix != ".html":
        raise UserError(f"out={out} must end in .html")
    make_writable("out", out.parent)
    if args.prompts and len(runs) > 1:
        raise UserError(f"prompts={args.prompts} needs one run; {len(runs)} are given")
    generated = generate_answers(runs[0], args.prompts, args.generator) if args.prompts else ()
    page = {"title": runs[0].name, "runs": runs, "table": None, "plots": []}
    if len(runs) > 1:
        heads, rows = overview_table(runs)
        page["table"] = {"heads": heads, "rows": [cells for _, cells in rows]}
        page["title"] = folders[0].resolve().name if is_folder else f"{len(runs)} runs"
        page["runs"] = [run for run, _ in rows]
        page["plots"] = overlaid_plots(runs)
    with_plots = len(runs) <= MAX_PLOTTED
    page["runs"] = [section(run, generated, with_plots=with_plots) for run in page["runs"]]
    write_atomic(out, render(**page))
    print(f"report: {out}")


if __name__ == "__main__":
    run_cli(main)
