"""Plot the loss of runs from their metrics.jsonl.

    python -m apps.LT2.scripts.plot_loss runs/demo                       # runs/demo/loss.png
    python -m apps.LT2.scripts.plot_loss runs/a runs/b --out both.png
    python -m apps.LT2.scripts.plot_loss runs/tune                       # all runs of a sweep

Training loss is plotted as logged (pale) and smoothed, validation loss as points, also that of
apps.LT2.eval with other options than the run's. Prints the final losses of each run. For other
metrics and axes, and for means over seeds, use apps.LT2.scripts.plot.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from apps.LT2.scripts.figure import (
    COLOURS,
    GREY,
    MAX_LABELS,
    MORE_COLOURS,
    Line,
    draw_lines,
    import_pyplot,
    label_lines,
    save_figure,
    set_plain_ticks,
    smooth,
)
from lingua.config.cli import OneLineParser
from lingua.errors import UserError, run_cli
from lingua.evaluations import VALIDATION_LOG, read_evaluations
from lingua.runs import runs_of

logger = logging.getLogger(__name__)


@dataclass
class Curve:
    """Points (step, nats per token) of one run."""

    name: str
    train: list[tuple[int, float]] = field(default_factory=list)
    val: list[tuple[int, float]] = field(default_factory=list)
    val_bpb: float | None = None  # bits per byte of the last validation
    # validation losses of apps.LT2.eval with other options, by these options
    others: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    n_not_finite: int = 0  # losses that were NaN or infinite; they are not plotted

    def summary(self) -> str:
        parts = []
        if self.train:
            step, loss = self.train[-1]
            parts.append(f"training loss {loss:.3f} at step {step}")
        if self.val:
            step, loss = self.val[-1]
            bits = "" if self.val_bpb is None else f" ({self.val_bpb:.3f} bits per byte)"
            parts.append(f"validation loss {loss:.3f}{bits} at step {step}")
        for label, points in self.others.items():
            step, loss = points[-1]
            parts.append(f"validation loss with {label} {loss:.3f} at step {step}")
        if self.n_not_finite:
            parts.append(f"{self.n_not_finite} losses were NaN or infinite and are not plotted")
        return f"{self.name}: {', '.join(parts)}"


class NothingToDrawError(UserError):
    """The folder is not a run, or the run has no loss yet."""


def read_curves(given: Sequence[Path]) -> list[Curve]:
    """Read runs, and all runs in folders of runs. Of several, those without a loss are skipped."""
    runs = [run for path in given for run in runs_of(path)]
    curves = []
    for name, run in runs:
        try:
            curves.append(read_curve(run, name))
        except NothingToDrawError as error:
            if len(runs) == 1:
                raise
            logger.warning("skipped: %s", error)
    if not curves:
        raise UserError(f"{', '.join(map(str, given))}: no run with a loss")
    return curves


def read_curve(run: Path, name: str = "") -> Curve:
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and run.exists():
            raise NothingToDrawError(f"{run}: no metrics.jsonl, and no runs in it") from None
        raise UserError(
            f"{path}: not readable: {error.strerror}; name a run's dump_dir, or a folder of runs"
        ) from None
    curve = Curve(name=name or run.resolve().name)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break  # a running run is still writing this line
            raise UserError(f"{path}:{number}: not JSON") from None
        step = record.get("global_step")
        for key, points in (("loss/out", curve.train), ("loss/val", curve.val)):
            if record.get(key) is not None:
                points.append((step, record[key]))
            elif key in record:  # NaN and infinity are null in the JSON
                curve.n_not_finite += 1
        if record.get("loss/val") is not None:
            curve.val_bpb = record.get("loss/val_bpb")
    add_evaluations(curve, run)
    if not curve.train and not curve.val and not curve.others:
        raise NothingToDrawError(f"{path}: no loss yet")
    return curve


def add_evaluations(curve: Curve, run: Path) -> None:
    """Add the validation losses of apps.LT2.eval. With the run's own options, training's count."""
    measured = {step for step, _ in curve.val}
    for evaluation in read_evaluations(run, VALIDATION_LOG):
        step, loss = evaluation.step, evaluation.scores.get("loss/val")
        if step is None or loss is None:
            continue
        if evaluation.label:
            curve.others.setdefault(evaluation.label, []).append((step, loss))
        elif step not in measured:
            curve.val = sorted([*curve.val, (step, loss)])
            if curve.val[-1][0] == step:
                curve.val_bpb = evaluation.scores.get("loss/val_bpb")
    for points in curve.others.values():
        points.sort()


def draw(curves: list[Curve], out: Path) -> None:
    pyplot = import_pyplot(needed_by="plotting the loss")
    figure, axes = pyplot.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
    lines = lines_of(curves)
    draw_lines(axes, lines)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title("Loss" if len(curves) > 1 else f"Loss of {curves[0].name}", loc="left")
    set_plain_ticks(axes.xaxis, whole=True)
    set_plain_ticks(axes.yaxis)
    label_lines(figure, axes, lines)
    save_figure(figure, out)
    pyplot.close(figure)


def lines_of(curves: Sequence[Curve]) -> list[Line]:
    """Return the lines of each run: training, validation, and validation with other options.

    Of several runs, training and validation share a colour, and the label of the validation.
    """
    lines: list[Line] = []
    several = len(curves) > 1
    for i, curve in enumerate(curves):
        colour = MORE_COLOURS[i] if i < len(MORE_COLOURS) else GREY
        dark = colour if several else COLOURS[1]
        prefix = f"{curve.name}: " if several else ""
        if curve.train:
            steps, losses = map(list, zip(*curve.train, strict=True))
            label = None if several and curve.val else f"{prefix}training"
            lines.append(Line(steps, smooth(losses), label, colour, raw=losses))
        if curve.val:
            steps, losses = map(list, zip(*curve.val, strict=True))
            bits = "" if curve.val_bpb is None else f", {curve.val_bpb:.2f} bits per byte"
            label = f"{prefix}validation ({losses[-1]:.2f}{bits} at the end)"
            lines.append(Line(steps, losses, label, dark, "--", "o", width=1))
        for marker, (options, points) in zip(cycle("sD^vP"), curve.others.items(), strict=False):
            steps, losses = map(list, zip(*points, strict=True))
            label = f"{prefix}validation, {options} ({losses[-1]:.2f} at the end)"
            lines.append(Line(steps, losses, label, dark, ":", marker))
    named = [line for line in lines if line.label]
    for line in named[MAX_LABELS:]:
        line.label = None
    if len(named) > MAX_LABELS:
        n = len(named) - MAX_LABELS
        print(f"the first {MAX_LABELS} lines are labelled, {n} others are not")
    return lines


def main(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="python -m apps.LT2.scripts.plot_loss",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="dump_dir of a run, or a folder of runs"
    )
    parser.add_argument("--out", type=Path, help="figure to write; default RUN/loss.png")
    args = parser.parse_args(argv)
    if args.out is None and len(args.runs) > 1:
        raise UserError("--out is needed for several runs, e.g. --out losses.png")
    curves = read_curves(args.runs)
    for curve in curves:
        print(curve.summary())
    out = args.out or args.runs[0] / "loss.png"
    draw(curves, out)
    print(f"loss curve: {out}")


if __name__ == "__main__":
    run_cli(main)
