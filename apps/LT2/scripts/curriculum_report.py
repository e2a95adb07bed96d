"""The stages of the synthetic curriculum as their metrics show them, and a report of n_max."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from apps.LT2.scripts.figure import GREY, MORE_COLOURS, draw_lines, import_pyplot, save_figure
from apps.LT2.scripts.study import Cell
from apps.LT2.scripts.study_report import format_facts, judge_claims, write_page
from apps.LT2.scripts.study_spec import Study
from lingua.args import load_config_file, print_text
from lingua.dataloader.synthetic.state_tracking import StateTracking
from lingua.errors import UserError
from lingua.evaluations import ENDED_BY
from lingua.files.atomic import write_atomic
from lingua.files.jsonl_log import json_line, read_jsonl_records
from lingua.run_columns import scientific, short
from lingua.runs import Run, read_runs
from lingua.slurm.run_list import RunOptions

logger = logging.getLogger(__name__)

LOOPS, LENGTH = "model.loop_count", "data.task.n"
ACCURACY = "acc/val"
COLUMNS = 4  # of the figure
STYLES = ("-", (0, (4, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 3)), (0, (1, 4)))  # by n
ENDS: dict[str, dict[str, Any]] = {
    "passed": {"marker": "o", "markersize": 4, "linestyle": ""},
    "failed": {"marker": "x", "markersize": 5, "linestyle": ""},
    "not ended": {"marker": "o", "markersize": 4, "markerfacecolor": "white", "linestyle": ""},
}


# ---- stages


@dataclass
class Stage(Cell):
    n: int
    steps: int  # at most
    flops_per_token: int  # of a training step
    state_bytes: int  # of the caches after one example, in bf16


@dataclass(frozen=True)
class Outcome:
    curve: list[tuple[int, float]]  # steps, and accuracy on held-out examples
    is_done: bool
    is_passed: bool


def read_outcome(run: Path, steps: int) -> Outcome:
    """Read how far a stage of at most `steps` steps is."""
    file, curve, is_passed = run / "metrics.jsonl", {}, False
    for record in read_jsonl_records(file) if file.exists() else []:
        if ACCURACY in record:
            curve[record["global_step"]] = record[ACCURACY]
            is_passed = ENDED_BY in record
    return Outcome(sorted(curve.items()), is_passed or steps in curve, is_passed)


@dataclass
class Chain:
    """The stages of one arm, T and seed, in the order of n."""

    arm: str
    n_loops: int
    seed: int
    stages: list[Stage]
    folder: Path
    _done: dict[int, Outcome] = field(default_factory=dict)  # by n

    @property
    def name(self) -> str:
        return f"{self.arm}, T={self.n_loops}"

    def run(self, stage: Stage) -> Path:
        return self.folder / stage.label(self.seed)

    def outcome(self, stage: Stage) -> Outcome:
        found = self._done.get(stage.n) or read_outcome(self.run(stage), stage.steps)
        if found.is_done:
            self._done[stage.n] = found
        return found

    def passed(self) -> list[Stage]:
        """Return the stages that passed, up to the first one that did not."""
        found = []
        for stage in self.stages:
            if not self.outcome(stage).is_passed:
                break
            found.append(stage)
        return found

    def next_stage(self) -> Stage | None:
        """Return the stage to run, or None if all have passed or one has failed."""
        left = self.stages[len(self.passed()) :]
        return left[0] if left and not self.outcome(left[0]).is_done else None

    @property
    def n_max(self) -> int:
        """The largest n that passed, or 0."""
        return max((stage.n for stage in self.passed()), default=0)

    def may_rise(self, longest: int) -> bool:
        """Whether n_max may rise, if the curriculum has stages up to `longest`.

        A chain of a command with fewer n may pass all of its stages.
        """
        return self.next_stage() is not None or self.n_max == self.stages[-1].n < longest


# ---- the report


def write_report(
    study: Study,
    folder: Path,
    record: Mapping[str, Any],
    chains: Sequence[Chain],
    not_run: Sequence[str],
) -> None:
    """Write the results of all stages that are done, and print the table."""
    done = [(c, s) for c in chains for s in c.stages if c.outcome(s).is_done]
    if not done:
        print("curriculum: no stage is done yet; the same command continues")
        return
    stop_at = study.options.get("eval.stop_at") or load_config_file(study.config)["eval"]["stop_at"]
    target = float(str(stop_at).rpartition("=")[2])
    guess = majority(study.options.get("data.task.n_pointers", StateTracking.n_pointers))
    table = format_table(chains)
    warning = format_warning(target, guess)
    print_text("\n".join(filter(None, [table, warning])))
    lines = [json_line(result_of(chain, stage)) for chain, stage in done]
    write_atomic(folder / f"{study.name}.jsonl", "".join(lines))
    plot = folder / f"{study.name}.png"
    try:
        draw_curves(chains, plot, target, guess)
    except UserError as error:
        logger.warning("%s is not drawn: %s; minutes=0 draws it later", plot, error)
    left = [c for c in chains if c.next_stage() is not None]
    longest = max(stage.n for chain in chains for stage in chain.stages)
    rising = [c for c in chains if c.may_rise(longest)]
    finals = [as_run(chain) for chain in chains if chain not in rising]
    # The seeds that fail early end first. For the others, n_max is at least the last that passed.
    # Seeds that wait count too, unless no seed of their arm and T has a result.
    has_result = {c.name for c in chains if c.outcome(c.stages[0]).curve}
    bounds = [as_run(chain) for chain in rising if chain.name in has_result]
    verdicts = judge_claims(study, finals, rising=bounds, most=longest)
    runs = read_runs([chain.run(stage) for chain, stage in done])
    seeds: dict[str, list[str]] = {}
    for chain in left:
        seeds.setdefault(chain.name, []).append(str(chain.seed))
    texts = [f"{n}, seed{'s' * (len(s) > 1)} {', '.join(s)}" for n, s in seeds.items()]
    unfinished = [f"the rest of {'; '.join(texts)}"] if texts else []
    module = f"python -m apps.LT2.scripts.{study.name}"
    commands = "\n".join(f"{module} {given} dump_dir=FOLDER" for given in record["commands"])
    figures = [plot] if plot.exists() else []
    facts = format_facts(study, runs, record, {}, [*unfinished, *not_run], commands)
    results = [table, warning, explain(target, guess, common_n(chains))]
    report = write_page(study, folder, verdicts, results, figures, facts)
    print(f"report: {report}" + (f"; {len(left)} chains are not finished" if left else ""))


def majority(n_bits: int) -> float:
    """Return the mean share of the more frequent value in `n_bits` random bits."""
    counts = (max(k, n_bits - k) * math.comb(n_bits, k) for k in range(n_bits + 1))
    return sum(counts) / n_bits / 2**n_bits


def format_warning(target: float, guess: float) -> str:
    """Return a warning if stages pass without training, as with size=tiny; else nothing."""
    if target > guess:
        return ""
    return (
        f"A stage passes at an accuracy of {target:g}, and a guess is right in {guess:.2f} of the "
        "examples: n_max means nothing here."
    )


def explain(target: float, guess: float, common: int | None) -> str:
    n = "the longest n of the row" if common is None else f"n = {common}"
    return (
        f"A stage passes when the accuracy on held-out examples reaches {target:g}; the next "
        "one starts from its weights, with a new optimizer. The most frequent of the "
        f"pointers' bits is right in {guess:.2f} of the examples at every n. n_max is the last "
        "stage that passed, the median over seeds, and in brackets that of each seed; `>=` "
        "means that the next stage has not ended, or ran in other rows only. Columns n=... "
        "have the number of passed and of run stages, with the median of their steps, or, if "
        f"none passed, with the mean accuracy at the end. State and FLOPs are for {n}: bytes "
        "of the caches of one sequence in bf16, and FLOPs per token of training. The paper "
        "does not say whether its stages keep the optimizer, nor its learning rate, batch, "
        "window and heads; these are ours."
    )


def format_table(chains: Sequence[Chain]) -> str:
    """Return a row for each arm and T, as Markdown."""
    lengths = sorted({stage.n for chain in chains for stage in chain.stages})
    common = common_n(chains)
    heads = ["arm", "T", "n_max", "seeds", "params", "state", "FLOPs/token"]
    rows = [[*heads, *(f"n={n}" for n in lengths)]]
    rows.append(["---", "---:", "---", "---:", "---:", "---:", "---:", *["---"] * len(lengths)])
    for (arm, n_loops), members in grouped(chains):
        of_seeds = [c for c in members if c.outcome(c.stages[0]).curve]
        stages = {stage.n: stage for c in members for stage in c.stages}
        shown = stages[common or max(stages)]
        facts = [short(shown.parameters), f"{short(shown.state_bytes)}B"]
        row = [arm, str(n_loops), format_n_max(of_seeds, lengths[-1]), str(len(of_seeds)), *facts]
        row.append(scientific(shown.flops_per_token))
        rows.append([*row, *(format_stage(members, n) for n in lengths)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def grouped(chains: Sequence[Chain]) -> list[tuple[tuple[str, int], list[Chain]]]:
    """Group chains that differ in the seed alone, in the order of arms and T."""
    arms = list(dict.fromkeys(chain.arm for chain in chains))

    def place(chain: Chain) -> tuple[int, int]:
        return arms.index(chain.arm), chain.n_loops

    ordered = sorted(chains, key=lambda chain: (*place(chain), chain.seed))
    groups = [list(members) for _, members in groupby(ordered, key=place)]
    return [((members[0].arm, members[0].n_loops), members) for members in groups]


def common_n(chains: Sequence[Chain]) -> int | None:
    """Return the largest n that all chains have, if there is one."""
    each = [{stage.n for stage in chain.stages} for chain in chains]
    return max(set.intersection(*each), default=None)


def format_n_max(chains: Sequence[Chain], longest: int) -> str:
    if not chains:
        return "-"
    open_ended = [chain.may_rise(longest) for chain in chains]
    each = [f"{'>=' * is_open}{c.n_max}" for c, is_open in zip(chains, open_ended, strict=True)]
    least = statistics.median(c.n_max for c in chains)
    most = statistics.median(
        math.inf if is_open else c.n_max for c, is_open in zip(chains, open_ended, strict=True)
    )
    median = f"{'>=' * (most > least)}{least:g}"
    return median if len(each) == 1 else f"{median} ({', '.join(each)})"


def format_stage(chains: Sequence[Chain], n: int) -> str:
    """Return passed/run and the median of the steps, or the accuracy at the end if none passed."""
    found = [c.outcome(s) for c in chains for s in c.stages if s.n == n]
    done = [outcome for outcome in found if outcome.is_done]
    if not done:
        return "-"
    steps = [outcome.curve[-1][0] for outcome in done if outcome.is_passed]
    share = f"{len(steps)}/{len(done)}"
    if steps:
        return f"{share} @{statistics.median(steps):g}"
    return f"{share} acc {statistics.fmean(outcome.curve[-1][1] for outcome in done):.2f}"


def result_of(chain: Chain, stage: Stage) -> dict[str, Any]:
    """Return all numbers of a stage that the table and the plot show."""
    outcome = chain.outcome(stage)
    return {
        **{"arm": chain.arm, LOOPS: chain.n_loops, LENGTH: stage.n, "seed": chain.seed},
        "passed": outcome.is_passed,
        "steps": outcome.curve[-1][0],
        "max_steps": stage.steps,
        "parameters": stage.parameters,
        "state_bytes": stage.state_bytes,
        "train_flops_per_token": stage.flops_per_token,
        f"{ACCURACY} by steps": outcome.curve,
    }


def as_run(chain: Chain) -> Run:
    """Return n_max of a chain as the metric of a run, for the verdicts of studies."""
    options = {"arm": chain.arm, LOOPS: chain.n_loops, "seed": chain.seed}
    metrics: dict[str, Any] = {"n_max": {0: float(chain.n_max)}}
    return Run(chain.name, chain.folder, RunOptions(options, {}, True), metrics, [], None, [])


def draw_curves(chains: Sequence[Chain], out: Path, target: float, guess: float) -> None:
    """Draw accuracy against the steps of all stages: an axes for each arm, a colour for each T.

    The style of a line is its n, and the marker at its end says how the stage ended.
    """
    plt = import_pyplot("the plot")
    arms = list(dict.fromkeys(chain.arm for chain in chains))
    loops = sorted({chain.n_loops for chain in chains})
    lengths = sorted({s.n for chain in chains for s in chain.stages if chain.outcome(s).curve})
    colours = {T: MORE_COLOURS[i % len(MORE_COLOURS)] for i, T in enumerate(loops)}
    styles = {n: STYLES[i % len(STYLES)] for i, n in enumerate(lengths)}
    n_rows = math.ceil(len(arms) / COLUMNS)
    shape = {"nrows": n_rows, "ncols": min(COLUMNS, len(arms)), "squeeze": False}
    size = (3 * shape["ncols"] + 1.4, 2.6 * n_rows + 0.8)
    figure, grid = plt.subplots(
        **shape, sharex=True, sharey=True, figsize=size, layout="constrained"
    )
    for axes in grid.flat[len(arms) :]:
        axes.set_visible(False)
    for arm, axes in zip(arms, grid.flat, strict=False):
        for level in (target, guess):
            axes.axhline(level, color=GREY, linestyle="--", linewidth=0.8)
        for chain in (c for c in chains if c.arm == arm):
            draw_chain(axes, chain, colours[chain.n_loops], styles)
        draw_lines(axes, [])  # only the grid
        axes.set_title(arm, fontsize=9)
        axes.tick_params(labelbottom=True)
    keys = [plt.Line2D([], [], color=colour, label=f"T = {T}") for T, colour in colours.items()]
    keys += [plt.Line2D([], [], color=GREY, ls=styles[n], label=f"n = {n}") for n in lengths]
    keys += [plt.Line2D([], [], color=GREY, label=end, **ENDS[end]) for end in ENDS]
    keys.append(plt.Line2D([], [], color=GREY, ls="--", lw=0.8, label="target, and a guess"))
    figure.legend(
        handles=keys, loc="outside right upper", frameon=False, fontsize=8, handlelength=4
    )
    figure.supxlabel("optimizer steps, all stages", fontsize=9)
    figure.supylabel("held-out accuracy", fontsize=9)
    save_figure(figure, out)
    plt.close(figure)


def draw_chain(axes: Any, chain: Chain, colour: Any, styles: Mapping[int, Any]) -> None:
    """Draw each stage of a chain, after the steps of the stages before it."""
    start = 0
    for stage in chain.stages:
        outcome = chain.outcome(stage)
        if not outcome.curve:
            continue
        x, y = [float(start + step) for step, _ in outcome.curve], [v for _, v in outcome.curve]
        axes.plot(x, y, color=colour, linestyle=styles[stage.n], linewidth=1)
        end = "passed" if outcome.is_passed else "failed" if outcome.is_done else "not ended"
        axes.plot(x[-1:], y[-1:], color=colour, **ENDS[end])
        start += outcome.curve[-1][0]
