"""Plot metrics of runs over steps, tokens, FLOPs or seconds, or final values against an option.

    python -m apps.LT2.scripts.plot runs/tune                            # runs/tune/plot.png
    python -m apps.LT2.scripts.plot runs/tune x=flops y=loss/val by=mixer mean=seed out=flops.pdf
    python -m apps.LT2.scripts.plot runs/tune x=loop_count by=mixer mean=seed out=loops.svg
    python -m apps.LT2.scripts.plot runs/demo x=loops              # after eval loop_counts=...

RUNS are dump_dirs of runs, or folders of runs. Names of options and metrics may be shortened to
their end: mixer for model.mixer, val for loss/val. The data go into a CSV file beside the
figure. Without out= the name of the figure has the options: RUN/plot_x=loops.png.

x=loops draws one checkpoint at several numbers of loops, x=loop_flops against its forward FLOPs per
token. A circle marks the loops of training. x=loop draws what `probe_freq` recorded after each loop
(y=residual_rms), x=depth at each layer (y=depth/first_token_mass).
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from apps.LT2.scripts.figure import (
    FORMATS,
    GREY,
    MAX_LABELS,
    MORE_COLOURS,
    Line,
    draw_lines,
    import_pyplot,
    label_lines,
    plain_number,
    save_figure,
    set_plain_ticks,
)
from apps.LT2.scripts.loop_points import (
    DEPTH,
    FLOPS,
    LOOP,
    LOOPS,
    OWN,
    find_score,
    loop_points,
    no_line,
    options_to_draw,
)
from apps.LT2.scripts.plot_series import (
    TITLES,
    Series,
    curves_over,
    curves_over_loops,
    finals_against,
)
from apps.LT2.scripts.run_metrics import (
    AXES,
    find_metric,
    metric_of_study,
    read_runs,
    with_metric,
)
from lingua.args import parse_args
from lingua.config.cli import split_paths
from lingua.errors import UserError, run_cli
from lingua.evaluations import label_of
from lingua.files.atomic import write_atomic
from lingua.files.lock import make_writable
from lingua.runs import (
    ABSENT,
    STEP,
    Run,
    as_number,
    differing_options,
    find_option,
    grouped,
    implied_options,
    list_names,
    natural_key,
    say_differing,
    short_option,
    warn_skipped,
)

logger = logging.getLogger(__name__)

MAX_OPTIONS = 6  # in the name of a line, if it is of one run
STYLES = ["-", "--", ":", "-."]
MARKERS = "osD^vPX*"


@dataclass
class PlotArgs:
    # steps, tokens, flops, seconds; an option, for the final value against it; loops or loop_flops,
    # for a checkpoint at several numbers of loops; loop or depth, for probes of one
    x: str = "steps"
    # metric; null: as the study draws it; else loss/val against an option or loops, else loss/out
    y: str | None = None
    by: str | None = None  # options that name the lines, e.g. mixer,loop_count: colour, then dashes
    mean: str | None = None  # options to average over, e.g. seed; each run is drawn pale
    smooth: int = 1  # logged values in the centred average of a curve; 1: none
    logx: bool = False
    logy: bool = False
    out: str | None = None  # .png, .svg or .pdf; null: RUN/plot.png, or e.g. RUN/plot_x=loops.png
    size: list[float] = field(default_factory=lambda: [8.0, 4.8])  # inches

    def __post_init__(self) -> None:
        if self.smooth < 1:
            raise UserError(f"smooth={self.smooth} must be at least 1 (1 does not smooth)")
        if len(self.size) != 2 or not all(2 <= side <= 40 for side in self.size):
            raise UserError(f"size={self.size} must be width and height in inches, e.g. [8, 4.8]")


# ---- from series to a figure


def mark_training(figure: Any, series: Sequence[Series], lines: Sequence[Line]) -> None:
    """Draw a circle at the loops of training of each line."""
    for one, line in zip(series, lines, strict=True):
        assert one.loops is not None
        if one.trained in one.loops:
            i = one.loops.index(one.trained)
            circle = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": line.colour}
            figure.axes[0].plot(line.x[i], line.y[i], "o", clip_on=False, **circle)


def as_lines(series: Sequence[Series], by: Sequence[str], is_curve: bool) -> list[Line]:
    """Give each series its colour, style and label; at most MAX_LABELS have a label."""
    differing = [o for o in series[0].options if len({s.options[o] for s in series}) > 1]
    options = by or ([] if has_run_names(series) else differing)
    texts = {o: list(dict.fromkeys(s.options[o] for s in series)) for o in options}
    hues = list(dict.fromkeys(s.options[by[0]] if by else i for i, s in enumerate(series)))
    labels: list[str] = []
    lines = []
    for i, one in enumerate(series):
        label = ", ".join(_value_label(o, one.options[o]) for o in options) or one.name
        if not by and label in labels:
            label = one.name
        hue = hues.index(one.options[by[0]] if by else i)
        style = texts[by[1]].index(one.options[by[1]]) if len(by) > 1 else 0
        is_labelled = len(series) > 1 and label not in labels and len(labels) < MAX_LABELS
        if is_labelled:
            labels.append(label)
        colour = MORE_COLOURS[hue] if hue < len(MORE_COLOURS) else GREY
        if not by and not is_labelled and len(series) > 1:
            colour = GREY
        lines.append(
            Line(
                one.x,
                one.drawn(one.y),
                label if is_labelled else None,
                colour,
                STYLES[style % len(STYLES)],
                "" if is_curve else MARKERS[hue % len(MARKERS)],
                raw=one.y if one.window > 1 and not one.is_mean else None,
                runs=one.curves(),
            )
        )
    return lines


def has_run_names(series: Sequence[Series]) -> bool:
    """Return whether lines have the names of their runs, which differ in too many options."""
    return len(series[0].options) > MAX_OPTIONS and all(one.name for one in series)


def _value_label(option: str, text: str) -> str:
    """Return "kda", or "loop_count=4" for a value that says nothing alone."""
    is_word = as_number(text) is None and text not in ("true", "false", "null", ABSENT)
    return text if is_word else f"{short_option(option)}={text}"


def draw(lines: list[Line], x: str, y: str, args: PlotArgs, title: str) -> Any:
    """Return a matplotlib figure of the lines. The caller closes it."""
    pyplot = import_pyplot(needed_by="plotting")
    figure, axes = pyplot.subplots(figsize=tuple(args.size), dpi=150, layout="constrained")
    ticks = None
    if isinstance(lines[0].x[0], str):  # values of an option
        texts = sorted({str(text) for line in lines for text in line.x}, key=natural_key)
        numbers = [as_number(text) for text in texts]
        known = [number for number in numbers if number is not None and math.isfinite(number)]
        if len(known) == len(texts):
            place = dict(zip(texts, known, strict=True))
            ticks = known if len(known) <= 10 else None
        else:  # words at equal distances, not connected
            place = {text: float(i) for i, text in enumerate(texts)}
            axes.set_xticks(range(len(texts)), texts)
            for line in lines:
                line.style = ""
        for line in lines:
            line.x = [place[str(text)] for text in line.x]
            line.runs = [([place[str(text)] for text in x], y) for x, y in line.runs]
        shift_runs(lines, args)
    if x in (LOOPS, LOOP):
        ticks = sorted({n for line in lines for n in line.x})
    if args.logx:
        axes.set_xscale("log")
    if args.logy:
        axes.set_yscale("log")
    draw_lines(axes, lines)
    if not lines[0].style:
        axes.margins(x=0.15)
    axes.set_xlabel(TITLES.get(x, x))
    axes.set_ylabel(TITLES.get(y, y))
    axes.set_title(title, loc="left", fontsize=10)
    if all(line.style for line in lines):
        set_plain_ticks(axes.xaxis, ticks, whole=x in (STEP, DEPTH) and not args.logx)
    set_plain_ticks(axes.yaxis)
    label_lines(figure, axes, lines)
    return figure


def shift_runs(lines: Sequence[Line], args: PlotArgs) -> None:
    """Shift the single points of each line sideways, so that none hides another."""
    means = [line for line in lines if line.runs]
    xs = sorted({x for line in lines for x in line.x})
    xs = [math.log(x) for x in xs if x > 0] if args.logx else xs
    if len(xs) < 2:
        return
    nearest = min(b - a for a, b in pairwise(xs)) / (xs[-1] - xs[0])
    points = min(25, nearest * args.size[0] * 72 / 2)  # of all lines together
    for i, line in enumerate(means):
        line.shift = (i - (len(means) - 1) / 2) * min(5, points / len(means))


def write_csv(series: Sequence[Series], x: str, y: str, out: Path) -> None:
    """Write what the figure shows, one row a point."""
    options, has_smoothed = list(series[0].options), series[0].window > 1
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    more = ["smoothed"] if has_smoothed else ["loops", "trained"] if series[0].loops else []
    has_others = any(one.evaluated_with for one in series)
    more += ["evaluated_with"] if has_others else []
    has_means = any(one.is_mean for one in series)
    more += ["of_runs"] if has_means else []
    table.writerow(["run", *options, x, y, "std", "n", *more])
    for one in series:
        columns: list[list[Any]] = [one.x, one.y, one.std, one.n]
        columns += [one.drawn(one.y)] if has_smoothed else []
        columns += [one.loops, [n == one.trained for n in one.loops]] if one.loops else []
        columns += [[one.evaluated_with or OWN] * len(one.x)] if has_others else []
        columns += [["; ".join(map(str, at.values())) for at in one.of_runs]] if has_means else []
        for at, *row in zip(one.of_runs, *columns, strict=True):
            table.writerow(["; ".join(at), *one.options.values(), *row])
    write_atomic(out, text.getvalue())


# ---- the command


def main(argv: list[str]) -> None:
    folders, options = split_paths(argv)
    prog = "python -m apps.LT2.scripts.plot RUNS..."
    args = parse_args(PlotArgs, options, prog=prog, doc=__doc__)
    if not folders:
        raise UserError("no runs given; name a run's dump_dir, or a folder of runs")
    if args.out is None and len(folders) > 1:
        raise UserError("out= is needed for several folders, e.g. out=losses.png")
    out = Path(args.out) if args.out else folders[0] / default_name(args)
    if out.suffix not in FORMATS:
        raise UserError(f"out={out} must end in {', '.join(FORMATS)}")
    make_writable("out", out.parent)
    plot(read_runs(folders), args, out)


def default_name(args: PlotArgs) -> str:
    """Name a figure after its options, so that it replaces no other one."""
    chosen = {name: value for name, value in vars(args).items() if value != vars(PlotArgs())[name]}
    chosen = {n: v.replace("/", "-") if isinstance(v, str) else v for n, v in chosen.items()}
    return f"plot_{label_of(chosen)}.png" if chosen else "plot.png"


def plot(runs: list[Run], args: PlotArgs, out: Path) -> None:
    """Write the figure and its data, and print the last value of each line."""
    differing = differing_options(runs)
    metrics = {key for run in runs for key in run.metrics}
    x = AXES.get(args.x, args.x)
    over_loops = x in (LOOPS, FLOPS, LOOP, DEPTH)
    is_curve = args.x in AXES or x in metrics or over_loops
    if not is_curve:
        x = find_option("x", x, runs, differing, hint=f"; {'/'.join(AXES)} work too")
    find = find_score if over_loops else find_metric
    y = args.y
    if y is None and (y := metric_of_study(runs, x, is_curve=is_curve)):
        print(f"y={y}, as in the report of the study")
    y = find(y or ("loss/out" if is_curve and not over_loops else "loss/val"), runs)
    by, mean = (
        [find_option(setting, name.strip(), runs, differing) for name in given.split(",")]
        if given
        else []
        for setting, given in (("by", args.by), ("mean", args.mean))
    )
    if over_loops:
        of_runs = [loop_points(run, y, x) for run in runs]
        missing = [r for r, p in zip(runs, of_runs, strict=True) if options_to_draw([p]) not in p]
        if len(missing) == len(runs):
            raise no_line(runs, y, x)
        warn_skipped(
            [run.name for run in missing], f"no {y} by loops; see eval loop_counts= and probe_freq"
        )
        runs = [run for run in runs if run not in missing]
    else:
        runs = with_metric(
            with_metric(runs, y, f"y={args.y or y}"), x if is_curve else y, f"x={args.x}"
        )
    for option in set(mean) - set(differing):
        logger.warning("mean=%s has no effect: %s", option, say_differing(differing))
    implied = implied_options(runs, differing, mean)
    shown = [o for o in differing if o not in implied]
    options = [o for o in dict.fromkeys([*by, *shown]) if o not in mean and o != x]
    by = [o for o in by if o in options]
    groups = grouped(runs, options)
    if is_curve and not mean:  # runs of equal options are separate lines
        groups = [(values, [run]) for values, members in groups for run in members]
    if over_loops:
        series = curves_over_loops(x, y, groups)
        if x in (LOOPS, FLOPS) and all(len(one.x) == 1 for one in series):
            raise no_line(runs, y, x)
    elif is_curve:
        series = curves_over(x, y, groups, args.smooth)
    else:
        series = finals_against(x, y, groups)
    check_points(series, x, y, is_curve, differing)
    lines = as_lines(series, by, is_curve and not over_loops)
    over = ", ".join(mean) or "equal runs"
    title = f"mean over {over}; pale: each run" if any(one.is_mean for one in series) else ""
    has_circles = x in (LOOPS, FLOPS)
    title = "; ".join([title] * bool(title) + ["circle: loops of training"] * has_circles)
    if any(one.evaluated_with for one in series):
        title += f"\nevaluated with {' or '.join({s.evaluated_with or OWN: 0 for s in series})}"
    print_lines(series, x, y, by)
    tell_unlabelled(lines, series, by)
    write_csv(series, x, y, out.with_suffix(".csv"))
    figure = draw(lines, x, y, args, title)
    if has_circles:
        mark_training(figure, series, lines)
    save_figure(figure, out)
    import_pyplot(needed_by="plotting").close(figure)
    print(f"figure: {out}, its data: {out.with_suffix('.csv')}")


def check_points(
    series: Sequence[Series], x: str, y: str, is_curve: bool, differing: Collection[str]
) -> None:
    if is_curve and all(len(one.x) == 1 for one in series):
        raise UserError(
            f"{y} has one point a run at x={x}, which makes no curve; "
            f"plot final values with x=<option> ({say_differing(differing)}), or log it more often"
        )
    values = {text for one in series for text in one.x}
    if len(values) < 2:
        raise UserError(
            f"x={x} has one value in the runs with {y}, {', '.join(values) or 'NaN'}; "
            f"{say_differing(differing)}"
        )


def print_lines(series: Sequence[Series], x: str, y: str, by: Sequence[str]) -> None:
    has_means = any(one.is_mean for one in series)
    by_run = has_run_names(series)
    for one in series:
        spread = f" ± {one.std[-1]:.3g}" if one.n[-1] > 1 else ""
        spread += f" (n={one.n[-1]})" if has_means else ""
        at = one.x[-1] if isinstance(one.x[-1], str) else plain_number(one.x[-1])
        names = [_value_label(o, one.options[o]) for o in (by if by_run else one.options)]
        name = ", ".join([*names, one.name] if by_run else names) or one.name
        value = f"{y} {one.y[-1]:.4g}{spread} at {TITLES.get(x, x)} {at}"
        print(f"{name}: {value}" if name else value)
    if by_run and not by:
        options = list_names([*map(short_option, series[0].options)])
        print(f"the runs differ in {options}; by= names lines by options, the CSV file has all")


def tell_unlabelled(lines: Sequence[Line], series: Sequence[Series], by: Sequence[str]) -> None:
    n_labelled = sum(line.label is not None for line in lines)
    if len(lines) == 1 or n_labelled == len(lines):
        return
    rest = [o for o in series[0].options if o not in by and len({s.options[o] for s in series}) > 1]
    if n_labelled < MAX_LABELS and rest:
        print(f"lines of the same colour differ in {list_names(rest)}; add them to by= or mean=")
    else:
        n = len(lines) - n_labelled
        print(
            f"{n_labelled} lines are labelled, {n} others are not; by= and mean= make fewer names"
        )


if __name__ == "__main__":
    run_cli(main)
