"""Write the results of a study: table, plots, the results of each run, verdicts, and a report.

A column of a study names a metric, whose last value counts, or a statistic of all its values:

    loss/val_bpb/4                 the last value
    max optim/grad_norm            the largest one after the first 50
    median optim/grad_norm         the median after the first 50
    spikes optim/grad_norm         how many are above 4 times the median of the 50 before
    loops/residual_rms/3 / loops/residual_rms/0      the ratio of the last values of two metrics
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from apps.LT2.scripts.loop_points import DEPTH, FLOPS, LOOP, LOOPS, loop_points
from apps.LT2.scripts.plot import PlotArgs, plot
from apps.LT2.scripts.plot_series import curve
from apps.LT2.scripts.report_data import environment, trained
from apps.LT2.scripts.run_metrics import AXES
from apps.LT2.scripts.study_spec import Study
from lingua.args import dataclass_from_dict, print_text
from lingua.errors import UserError
from lingua.files.atomic import write_atomic
from lingua.files.jsonl_log import json_line
from lingua.run_table import Table, build_table, format_as
from lingua.runs import Run, option_text, read_runs
from lingua.slurm.run_list import Options, read_record
from lingua.slurm.run_names import name_group
from lingua.sweep import as_arguments

logger = logging.getLogger(__name__)

SPIKE, WINDOW = 4.0, 50  # times the median of so many steps before
MAX_POINTS = 100  # of a curve in NAME.jsonl
OF_TRAINING = ("Data", "Task", "Optimizer")  # rows of report_data
COUNTS = {"parameters": "params", "flops": "FLOPs", "tokens": "tokens"}  # columns, and their heads
FACTS = {
    "params": "model/parameters",
    "flops": "optim/total_flops",
    "tokens": "optim/total_tokens",
}


@dataclass
class Claim:
    """The values of `column` in the runs `lower` are below those in the runs `than`.

    Both are options of a run, among them `arm`.
    """

    claim: str
    column: str
    lower: dict[str, Any]
    than: dict[str, Any]
    paper: str = "-"  # its number


def check_results(study: Study) -> None:
    """Raise UserError for columns, plots or claims that no run can have."""
    for head, metric in study.columns.items():
        name = metric.rpartition(" ")[0]
        if name and " / " not in metric and name not in STATISTICS:
            raise UserError(
                f"columns: {head}: {name} must be one of {', '.join(STATISTICS)}, or A / B"
            )
    options = {option for arm in study.arms.values() for option in arm}
    options |= {"arm", "seed", *study.over, *study.options}
    for given in study.claims:
        claim = dataclass_from_dict(Claim, given)
        if claim.column not in study.columns:
            columns = ", ".join(study.columns)
            raise UserError(f"claims: column={claim.column} must be one of {columns}")
        for side in (claim.lower, claim.than):
            if (arm := side.get("arm")) is not None and arm not in study.arms:
                raise UserError(f"claims: no arm {arm!r}; use {', '.join(map(repr, study.arms))}")
            for option in side.keys() - options:
                raise UserError(f"claims: {option} must be arm, or an option that the study sets")
    for drawn in map(plot_options, study.plots):
        if drawn.y is None:
            raise UserError(f"plots: x={drawn.x} has no y; name a metric")


# ---- statistics of a run


def spikes(values: Sequence[float]) -> float:
    """Count values above SPIKE times the median of the WINDOW values before them."""
    before = [values[max(0, i - WINDOW) : i] for i in range(len(values))]
    medians = [statistics.median(v) if len(v) == WINDOW else math.inf for v in before]
    return sum(v > SPIKE * median for v, median in zip(values, medians, strict=True))


STATISTICS = {
    "max": lambda values: max(values[WINDOW:] or values),
    "median": lambda values: statistics.median(values[WINDOW:] or values),
    "spikes": spikes,
}


def add_statistics(run: Run, columns: Sequence[str]) -> None:
    """Add the statistics that columns name to the metrics of the run."""
    for column in columns:
        above, slash, below = column.partition(" / ")
        if slash and {above, below} <= run.metrics.keys():
            ratio = last(run, above) / last(run, below)
            run.metrics[column] = {run.step: ratio if math.isfinite(ratio) else None}
            continue
        name, _, metric = column.rpartition(" ")
        if name and (values := run.metrics.get(metric)):
            finite = [math.inf if v is None else v for _, v in sorted(values.items())]
            found = STATISTICS[name](finite)
            run.metrics[column] = {run.step: found if math.isfinite(found) else None}


def warn_missing(study: Study, runs: Sequence[Run]) -> None:
    for head, metric in study.columns.items():
        if all(metric not in run.metrics for run in runs):
            logger.warning("columns: %s: no run has %s", head, metric)


def last(run: Run, metric: str) -> float:
    """Return the last value, infinite if it was NaN or is missing: worse than all others."""
    found = run.newest(metric)
    return math.inf if found is None or found[1] is None else found[1]


# ---- table, verdicts, data


def units_of_losses(columns: Mapping[str, str], runs: Sequence[Run]) -> str:
    """Return the units of losses among the columns, e.g. "T=1, T=2: loss in bits per byte."."""
    is_task = any("Task" in dict(trained(run)) for run in runs)
    nats = f"nats per {'answer' if is_task else 'token'}"
    heads: dict[str, list[str]] = {}
    for head, metric in columns.items():
        if metric.startswith("loss/") and " / " not in metric:
            unit = "bits per byte" if "_bpb" in metric else nats
            heads.setdefault(unit, []).append(head)
    return " ".join(f"{', '.join(names)}: loss in {unit}." for unit, names in heads.items())


def results_table(study: Study, runs: list[Run]) -> Table:
    """Return a row for each arm and value of `over`, in their order, with means over seeds."""
    heads = {option: option.rpartition(".")[2] for option in ("arm", *study.over)}
    names = {**heads, "n": "n", **COUNTS, **{m: head for head, m in study.columns.items()}}
    known = {metric for run in runs for metric in run.metrics}
    names = {n: head for n, head in names.items() if n not in study.columns.values() or n in known}
    table = build_table(runs, columns=",".join(names), mean="seed")
    for column, head in zip(table.columns, names.values(), strict=True):
        column.header = head
    options = ("arm", *study.over)
    places = [list(study.arms), *study.over.values()]
    keys = [
        [place.index(cell.value) for place, cell in zip(places, cells, strict=True)]
        for cells in zip(*(c.cells for c in table.columns[: len(options)]), strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    for column in table.columns:
        column.cells = [column.cells[i] for i in order]
    return table


def judge(
    study: Study,
    claim: Claim,
    runs: Sequence[Run],
    unfinished: Sequence[Run] = (),
    rising: Sequence[Run] = (),
    most: float = math.inf,
) -> tuple[str, str]:
    """Return both sides of the claim with their names and spread, and the verdict.

    A claim holds if every run of the one side is below every run of the other. With three seeds,
    chance alone does that in one of 20 cases. `unfinished` are runs that may end with any value,
    such as failed runs, which may have diverged. `rising` are runs whose value can only rise, up to
    `most`. A claim is open while they can decide it.
    """

    def members(where: dict[str, Any], among: Sequence[Run]) -> list[Run]:
        return [r for r in among if all(r.options.current.get(o) == v for o, v in where.items())]

    metric, both = study.columns[claim.column], (claim.lower, claim.than)
    sides = [[last(run, metric) for run in members(where, runs)] for where in both]
    bounds = [[last(run, metric) for run in members(where, rising)] for where in both]
    values = [format_values(*kinds) for kinds in zip(sides, bounds, strict=True)]
    ours = ", ".join(f"{side_name(w)} {value}" for w, value in zip(both, values, strict=True))
    n_runs = min(len(side) + len(more) for side, more in zip(sides, bounds, strict=True))
    if n_runs < 2:
        return ours, "inconclusive: one seed" if n_runs else "not run"
    unknown = [[(-math.inf, math.inf)] * len(members(where, unfinished)) for where in both]
    ranges = [
        [*((v, v) for v in side), *((v, most) for v in more), *others]
        for side, more, others in zip(sides, bounds, unknown, strict=True)
    ]
    (least_low, most_low), (least_high, most_high) = (zip(*side, strict=True) for side in ranges)
    holds, may_hold = max(most_low) < min(least_high), max(least_low) < min(most_high)
    fails, may_fail = min(least_low) > max(most_high), min(most_low) > max(least_high)
    if (may_hold or may_fail) and not (holds or fails):
        return ours, "inconclusive: a run is not finished"
    if study.size == "tiny":
        return ours, "not judged"
    return ours, "holds" if holds else "fails" if fails else "inconclusive"


def side_name(where: dict[str, Any]) -> str:
    """Return the name of the runs on one side of a claim, such as "gdn loop_count=4"."""
    return " ".join(
        str(value) if option == "arm" else f"{option.rpartition('.')[2]}={value}"
        for option, value in where.items()
    )


def format_values(values: Sequence[float], bounds: Sequence[float]) -> str:
    """Return all values if they are whole numbers, else their mean and standard deviation."""
    if any(value % 1 for value in (*values, *bounds)) or not (values or bounds):
        return mean_and_std([*values, *bounds])
    return " ".join([*(f"{v:g}" for v in values), *(f">={v:g}" for v in bounds)])


def mean_and_std(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return f"not finite in {sum(not math.isfinite(v) for v in values)} of {len(values)}"
    spread = f"±{statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def result_of(study: Study, run: Run) -> dict[str, Any]:
    """Return all numbers of a run that the table and the plots show."""
    options = run.options.current
    result: dict[str, Any] = {option: options[option] for option in ("arm", *study.over, "seed")}
    result["steps"] = run.step
    for name, metric in (FACTS | study.columns).items():
        if found := run.newest(metric):
            result[name] = found[1]
    for drawn in map(plot_options, study.plots):
        y = str(drawn.y)
        if drawn.x in (LOOPS, FLOPS, LOOP, DEPTH):
            own = loop_points(run, y, drawn.x).get("", {})
            points = [[n, value] for n, (_, value) in own.items()]
        elif drawn.x in AXES and y in run.metrics:
            curved = list(map(list, zip(*curve(run, AXES[drawn.x], y), strict=True)))
            points = curved[:: max(1, -(-len(curved) // MAX_POINTS))]
        else:
            continue
        result[f"{y} by {drawn.x}"] = points
    return result


# ---- the files


def plot_options(drawn: Mapping[str, Any]) -> PlotArgs:
    return dataclass_from_dict(PlotArgs, drawn)


def write_report(
    study: Study, folder: Path, record: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Write the results of all finished runs, and print the table."""
    swept = {k: v for k, v in read_record(folder).items() if k in record["runs"]}
    swept = {label: options for label, options in swept.items() if has_run(study, options)}
    found = {label: folder / label for label in swept if (folder / label).is_dir()}
    runs = read_runs(list(found.values())) if found else []
    failed = [run for run in runs if run.status == "failed"]
    runs = [run for run in runs if run.status == "finished"]
    if not runs:
        print("study: no run has finished yet; the same command continues")
        return
    for run in runs:
        add_statistics(run, list(study.columns.values()))
    warn_missing(study, runs)
    table = results_table(study, runs)
    units = units_of_losses(study.columns, runs)
    tiny = TINY if study.size == "tiny" else ""
    print_text("\n".join(filter(None, [format_as(table, "table"), units, tiny])))
    lines = [json_line(result_of(study, run)) for run in runs]
    write_atomic(folder / f"{study.name}.jsonl", "".join(lines))
    figures = draw_plots(study, runs, folder)
    verdicts = judge_claims(study, runs, unfinished=failed)
    missing = swept.keys() - {run.path.name for run in runs}
    spikes = SPIKES if any("spikes" in m for m in study.columns.values()) else ""
    after = AFTER if any(m.startswith(("max ", "median ")) for m in study.columns.values()) else ""
    explained = " ".join(filter(None, [EXPLAINED, units, spikes, after]))
    facts = format_facts(study, runs, record, given, find_not_run(study, swept, missing, failed))
    results = [format_as(table, "markdown"), explained]
    report = write_page(study, folder, verdicts, results, figures, facts)
    n_left = f"; {len(missing)} runs are not finished" if missing else ""
    print(f"report: {report}{n_left}")


def find_not_run(
    study: Study, swept: Mapping[str, Options], missing: Collection[str], failed: Sequence[Run]
) -> list[str]:
    """Name runs without a result, arms and sizes that were not run, each once."""
    errors = {run.path.name: run.error for run in failed}
    left = [label for label in swept if label in missing and label not in errors]
    not_run = [name_group(left, swept)] if left else []
    named = {str(options["arm"]) for options in swept.values()}
    not_run += [f"arm={arm}" for arm in study.arms if arm not in named]
    not_run += [f"failed: {label}: {error}" for label, error in errors.items()]
    return not_run + [f"size={s}" for s in study.sizes if s not in (study.size, "tiny")]


def judge_claims(study: Study, runs: Sequence[Run], **others: Any) -> list[tuple[Claim, str, str]]:
    """Return each claim with both sides and the verdict, and print them. See `judge`."""
    claims = [dataclass_from_dict(Claim, claim) for claim in study.claims]
    verdicts = [(claim, *judge(study, claim, runs, **others)) for claim in claims]
    for claim, ours, verdict in verdicts:
        print_text(f"{verdict}: {claim.claim} {claim.column}: {ours}")
    return verdicts


def write_page(
    study: Study,
    folder: Path,
    verdicts: Sequence[tuple[Claim, str, str]],
    results: Sequence[str],
    figures: Sequence[Path],
    facts: str,
) -> Path:
    """Write the report: verdicts, results and figures, and how they were made."""
    parts = [
        f"# {study.name}: {study.question}",
        TINY if study.size == "tiny" else "",
        format_verdicts(verdicts),
        *results,
        *(f"![{study.name}]({figure.name})" for figure in figures),
        facts,
    ]
    report = folder / f"{study.name}.md"
    write_atomic(report, "\n\n".join(part for part in parts if part) + "\n")
    return report


TINY = "This is size=tiny, a test of the command. Its numbers say nothing about the claims."
EXPLAINED = "Mean and standard deviation over n seeds. FLOPs and tokens are of training."
SPIKES = f"A spike is a step with more than {SPIKE:g} times the median of the {WINDOW} before it."
AFTER = f"Maxima and medians are of the steps after the first {WINDOW}."


def has_run(study: Study, swept: Mapping[str, Any]) -> bool:
    """Return whether the study still has the arm and the values of a run of its folder."""
    values = {"arm": study.arms, **study.over}
    return swept.keys() == values.keys() | {"seed"} and all(
        swept[option] in among for option, among in values.items()
    )


def draw_plots(study: Study, runs: list[Run], folder: Path) -> list[Path]:
    """Draw the plots that have data. Without matplotlib, warn: another machine may draw them."""
    drawn = []
    for i, options in enumerate(map(plot_options, study.plots), start=1):
        out = folder / f"{study.name}{f'-{i}' if i > 1 else ''}.png"
        axes = {
            o.rpartition(".")[2]: len({option_text(run, o) for run in runs}) for o in study.over
        }
        if axes.get(options.x) == 1:  # one value makes no line
            options = replace(options, x="arm")
        by = [o for o in ("arm", *study.over) if o.rpartition(".")[2] != options.x]
        try:
            with redirect_stdout(StringIO()):
                plot(runs, replace(options, by=",".join(by), mean="seed"), out)
        except UserError as error:
            logger.warning("%s is not drawn: %s; minutes=0 draws it later", out, error)
        else:
            drawn.append(out)
    return drawn


def format_verdicts(verdicts: Sequence[tuple[Any, str, str]], rule: str = "") -> str:
    """Return a table of claims, what was measured, and verdicts, with the rule of the verdicts."""
    rows = ["| claim | paper | measured here | verdict |", "|---|---|---|---|"]
    for claim, ours, verdict in verdicts:
        rows.append(f"| {claim.claim} | {claim.paper} | {claim.column}: {ours} | {verdict} |")
    rule = rule or (
        "A claim holds if every seed of one side is below every seed of the other. With three "
        "seeds a side, chance alone does this in one of 20 cases."
    )
    return "\n".join([*rows, "", rule]) if verdicts else ""


def options_of_arm(study: Study, arm: str) -> str:
    """Return the values of the options that arms set, as arguments in backticks."""
    names = dict.fromkeys(name for own in study.arms.values() for name in own)
    options = {**study.options, **study.arms[arm]}
    text = shlex.join(as_arguments({name: options[name] for name in names if name in options}))
    return f"`{text}`" if text else "as the recipe"


def merged(values: Iterable[str]) -> str:
    """Join "n=8, name=copy" and "n=16, name=copy" to "n=8/16, name=copy", others with ";"."""
    texts = list(values)
    rows = [text.split(", ") for text in texts]
    if len({tuple(part.partition("=")[0] for part in row) for row in rows}) != 1:
        return "; ".join(texts)
    parts = []
    for column in zip(*rows, strict=True):
        first, *others = dict.fromkeys(column)
        parts.append("/".join([first, *(other.partition("=")[2] for other in others)]))
    return ", ".join(parts)


def format_facts(
    study: Study,
    runs: Sequence[Run],
    record: Mapping[str, Any],
    given: Mapping[str, Any],
    not_run: Sequence[str],
    command: str = "",
) -> str:
    """Say how the runs were made, and how to repeat them: by default with `lt2 study`.

    `command` is of a curriculum, whose arms have nothing equal: a stage ends when it passes.
    """
    facts: dict[str, dict[str, None]] = {}  # the values that runs have
    for run in runs:
        for name, value in [*environment(run), *trained(run)]:
            facts.setdefault(name, {})[value] = None
    seeds = sorted({int(run.options.current["seed"]) for run in runs})
    options = [f"size={study.size}", f"seeds={seeds[-1]}"]
    options += map(shlex.quote, as_arguments(dict(given)))
    is_gpu = not any("CPU" in name for name in facts.get("Devices", ()))
    equal = [f"parameters (match={study.match})" if study.match else "", "training FLOPs"]
    equal = [equal[0], equal[1] if study.equal == "flops" else "steps"]
    shown = {
        "Arms": "; ".join(f"{arm}: {options_of_arm(study, arm)}" for arm in study.arms),
        "Equal in all arms": "" if command else ", ".join(filter(None, equal)),
        "Recipe": Path(study.config).name,
        **{name: merged(facts.get(name, ())) for name in (*OF_TRAINING, "Commit", "Devices")},
        "CPU cores": f"{os.cpu_count()}",
        "Versions": "; ".join(facts.get("Versions", ())),
        "Seeds": ", ".join(map(str, seeds)),
        "GPU hours" if is_gpu else "Hours": f"{record['seconds'] / 3600:.3f}",
        "Not run": "; ".join(not_run) or "nothing",
    }
    rows = [f"- {name}: {value}" for name, value in shown.items() if value]
    own = f"python -m apps.LT2.scripts.study {study.name} {' '.join(options)} dump_dir=FOLDER"
    data = f"- Results of each run: [{study.name}.jsonl]({study.name}.jsonl)"
    return "\n".join([f"```bash\n{command or own}\n```\n", *rows, data])
