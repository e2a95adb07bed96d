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
import statistics
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
    smooth,
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
    trained_loops,
    warn_of_options,
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
    option_text,
    say_differing,
    short_option,
    warn_skipped,
)

logger = logging.getLogger(__name__)

TITLES = {
    STEP: "optimizer step",
    LOOPS: "loops",
    FLOPS: "forward FLOPs per token",
    LOOP: "loop",
    DEPTH: "layer, over all loops",
    "optim/total_tokens": "training tokens",
    "optim/total_flops": "training FLOPs",
    "time/elapsed": "seconds",
    "loss/out": "training loss (nats per token)",
    "loss/val": "validation loss (nats per token)",
    "loss/val_bpb": "validation loss (bits per byte)",
    "acc/out": "training accuracy",
    "acc/val": "validation accuracy",
    "speed/tokens_per_s": "training tokens/s",
    "loops/residual_rms": "RMS of the residual stream after the loop",
    "depth/first_token_mass": "attention on the first token",
}
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


@dataclass
class Series:
    """A line before it gets its colour: one run, or several that differ in `mean`."""

    options: dict[str, str]  # options that differ between runs, except x= and mean=
    name: str  # of its run; "" of several
    x: list[Any]
    of_runs: list[dict[str, float]]  # at each x, the values that are averaged, by name of the run
    window: int = 1  # of PlotArgs.smooth
    loops: list[int] | None = None  # of each point, for x=loops and x=loop_flops
    trained: int | None = None  # loops of training
    evaluated_with: str = ""  # options of the evaluations; "": the run's own

    @cached_property
    def y(self) -> list[float]:
        return [statistics.fmean(values.values()) for values in self.of_runs]

    @cached_property
    def std(self) -> list[float]:
        values = [[*at.values()] for at in self.of_runs]
        return [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]

    @property
    def n(self) -> list[int]:
        return [len(values) for values in self.of_runs]

    @property
    def is_mean(self) -> bool:
        return any(n > 1 for n in self.n)

    def drawn(self, values: list[float]) -> list[float]:
        return smooth(values, self.window) if self.window > 1 else values

    def curves(self) -> list[tuple[list[Any], list[float]]]:
        """Return the curve of each run of a mean, none without means."""
        points: dict[str, tuple[list[Any], list[float]]] = {}
        for x, at in zip(self.x, self.of_runs, strict=True) if self.is_mean else ():
            for name, y in at.items():
                xs, ys = points.setdefault(name, ([], []))
                xs.append(x)
                ys.append(y)
        return [(xs, self.drawn(ys)) for xs, ys in points.values()]


# ---- from runs to series


def curve(run: Run, x: str, y: str) -> tuple[list[float], list[float]]:
    """Return the finite values of `y`, ordered by `x`.

    A record without `x`, such as a validation, gets it from the records around it, linearly in the
    step.
    """
    points = sorted((step, value) for step, value in run.metrics[y].items() if value is not None)
    steps = [step for step, _ in points]
    if x == STEP:
        return [float(step) for step in steps], [value for _, value in points]
    known = {0: 0.0} | {s: v for s, v in run.metrics[x].items() if v is not None}
    at, values = zip(*sorted(known.items()), strict=True)
    return [interpolate(step, at, values) for step in steps], [value for _, value in points]


def interpolate(x: float, at: Sequence[float], values: Sequence[float]) -> float:
    """Interpolate linearly between sorted points, and extrapolate from the nearest two."""
    i = min(max(bisect_left(at, x), 1), len(at) - 1)
    if at[i] == at[i - 1]:
        return values[i]
    share = (x - at[i - 1]) / (at[i] - at[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


def on_one_grid(
    curves: Mapping[str, tuple[list[float], list[float]]],
) -> tuple[list[float], list[dict[str, float]]]:
    """Return the x of the first curve, as far as all of them reach, and the values there."""
    if len(curves) == 1:
        ((name, (xs, ys)),) = curves.items()
        return xs, [{name: y} for y in ys]
    low, high = max(x[0] for x, _ in curves.values()), min(x[-1] for x, _ in curves.values())
    grid = [x for x in next(iter(curves.values()))[0] if low <= x <= high]
    if high not in grid and low <= high:
        grid.append(high)
    return grid, [{name: interpolate(at, x, y) for name, (x, y) in curves.items()} for at in grid]


def curves_over(x: str, y: str, groups: Any, window: int) -> list[Series]:
    found = []
    for options, members in groups:
        points = {run.name: curve(run, x, y) for run in members}
        ends = [xs[-1] for xs, _ in points.values()]
        first, last = min(ends), max(ends)
        if first < 0.99 * last:
            logger.warning(
                "a mean ends at %s %s with its shortest run; the longest ends at %s",
                *(TITLES.get(x, x), plain_number(first), plain_number(last)),
            )
        xs, of_runs = on_one_grid(points)
        if xs:
            found.append(Series(options, name_of(list(points)), xs, of_runs, window))
    return found


def curves_over_loops(x: str, y: str, groups: Any) -> list[Series]:
    """Return one series a group: scores of checkpoints at several numbers of loops.

    All points of a series are of evaluations with the same options, and so are all series if some
    options have several T in every run.
    """
    found, choices = [], []
    by_group = [{run.name: loop_points(run, y, x) for run in members} for _, members in groups]
    everything = [of_run for of_runs in by_group for of_run in of_runs.values()]
    shared = options_to_draw(everything)
    is_shared = all(len(of_run.get(shared, ())) > 1 for of_run in everything)
    for (options, members), of_runs in zip(groups, by_group, strict=True):
        drawn = shared if is_shared else options_to_draw([*of_runs.values()])
        points = {name: of_run[drawn] for name, of_run in of_runs.items() if drawn in of_run}
        choices.append((drawn, of_runs))
        loops = sorted({n for of_run in points.values() for n in of_run})
        at = [{name: p[n] for name, p in points.items() if n in p} for n in loops]
        values = [{name: value for name, (_, value) in of_loops.items()} for of_loops in at]
        xs = [statistics.fmean(x for x, _ in of_loops.values()) for of_loops in at]
        trained = {trained_loops(run) for run in members}
        series = Series(options, name_of(list(points)), xs, values)
        series.evaluated_with = drawn
        if x in (LOOPS, FLOPS):
            series.loops, series.trained = loops, trained.pop() if len(trained) == 1 else None
        found += [series] if loops else []
    warn_of_options(choices)
    return found


def mark_training(figure: Any, series: Sequence[Series], lines: Sequence[Line]) -> None:
    """Draw a circle at the loops of training of each line."""
    for one, line in zip(series, lines, strict=True):
        assert one.loops is not None
        if one.trained in one.loops:
            i = one.loops.index(one.trained)
            circle = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": line.colour}
            figure.axes[0].plot(line.x[i], line.y[i], "o", clip_on=False, **circle)


def name_of(runs: Sequence[str]) -> str:
    return runs[0] if len(runs) == 1 else ""


def finals_against(option: str, y: str, groups: Any) -> list[Series]:
    """Return one series a group: the last values of its runs against an option."""
    found, diverged, mixed = [], [], set()
    for options, members in groups:
        steps: dict[str, set[int]] = {}
        at: dict[str, dict[str, float]] = {}  # value of the option -> final values of its runs
        for run in members:
            step = max(run.metrics[y])
            value = run.metrics[y][step]
            if value is None:
                diverged.append(run.name)
            else:
                text = option_text(run, option)
                steps.setdefault(text, set()).add(step)
                at.setdefault(text, {})[run.name] = value
        mixed |= {step for of_point in steps.values() if len(of_point) > 1 for step in of_point}
        if at:
            texts = sorted(at, key=natural_key)
            name = name_of(["; ".join(at[text]) for text in texts])
            found.append(Series(options, name, texts, [at[text] for text in texts]))
    warn_skipped(diverged, f"the last {y} is NaN or infinite")
    if mixed:
        logger.warning(
            "means are of different steps, %d to %d: some runs are shorter or still running",
            *(min(mixed), max(mixed)),
        )
    return found


# ---- from series to a figure


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
    """Shift single runs beside their means, so that no line hides those of another."""
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
