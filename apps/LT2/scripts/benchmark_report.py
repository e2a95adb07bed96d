"""Write a report of results of benchmark_prefill or of benchmark_train: tables and a figure.

    bash apps/LT2/scripts/benchmark_prefill_all.sh
    python -m apps.LT2.scripts.benchmark_report runs/benchmark_prefill/*.json --out runs/decode.md
    python -m apps.LT2.scripts.benchmark_report runs/benchmark_train/*.json --out runs/speed.md

Beside NAME.md it writes NAME.png and NAME.jsonl, which has a line for each point. A file contains
the output of the benchmark, or only its last line (JSON). The files have results of one benchmark.

Results of benchmark_prefill are judged by claims, which compare two points. Claims come from
configs/benchmark/decode.yaml, or from the file in --claims. Results of benchmark_train are relative
to the recipe in --reference (apps.LT2.scripts.benchmark_train_report).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.LT2.scripts.benchmark_results import (
    PREFILL,
    TRAIN,
    format_facts,
    read_results,
    write_files,
)
from apps.LT2.scripts.benchmark_train_report import write_train_report
from apps.LT2.scripts.figure import format_length
from apps.LT2.scripts.plot_benchmark import draw
from apps.LT2.scripts.study_report import format_verdicts
from lingua.args import dataclass_from_dict, load_config_file
from lingua.config.cli import OneLineParser
from lingua.errors import UserError, run_cli
from lingua.files.lock import make_writable

logger = logging.getLogger(__name__)

CLAIMS = Path(__file__).parents[1] / "configs" / "benchmark" / "decode.yaml"
COLUMNS = ("prefill", "decode", "cache")
RULE = (
    "A ratio compares medians; its range compares quartiles. A claim holds if the whole range "
    "is on its side of the bound, and fails if the whole range is on the other."
)

Row = dict[str, Any]


@dataclass
class RatioClaim:
    """The `column` of the point `of`, relative to the point `to`, has a bound.

    Points are fields of a row: config, batch_size, seqlen. The columns prefill and decode are
    speeds, cache is the size for one sequence.
    """

    claim: str
    column: str
    of: dict[str, Any]
    to: dict[str, Any]
    at_least: float | None = None
    at_most: float | None = None
    paper: str = "-"  # its number

    def __post_init__(self) -> None:
        if self.column not in COLUMNS:
            raise UserError(f"column={self.column} must be one of {', '.join(COLUMNS)}")


def judge(claim: RatioClaim, rows: Sequence[Row]) -> tuple[str, str]:
    """Return the ratio with its range, and the verdict."""
    sides = [
        [row for row in rows if all(row[field] == value for field, value in where.items())][-1:]
        for where in (claim.of, claim.to)
    ]
    if not all(sides):
        return "-", "not run"
    (above,), (below,) = sides
    if claim.column == "cache":
        low = middle = high = above["cache_mib"] / below["cache_mib"]
    else:
        costs = above[claim.column], below[claim.column]
        if problems := [cost["problem"] for cost in costs if cost["ms"] is None]:
            return problems[0], "not run"
        (fast, (fast_low, fast_high)), (slow, (slow_low, slow_high)) = (
            (cost["ms"], cost["quartiles_ms"]) for cost in costs
        )
        speed = above["batch_size"] / below["batch_size"]  # of steps of several sequences
        if claim.column == "prefill":
            speed *= above["seqlen"] / below["seqlen"]
        low, middle, high = (
            speed * r for r in (slow_low / fast_high, slow / fast, slow_high / fast_low)
        )
    ours = f"{middle:.3f} ({low:.3f}-{high:.3f})" if low < high else f"{middle:.3f}"
    least, most = claim.at_least or 0.0, math.inf if claim.at_most is None else claim.at_most
    if least <= low and high <= most:
        return ours, "holds"
    return ours, "fails" if high < least or low > most else "inconclusive"


# ---- the report


def format_table(rows: Sequence[Row], head: str, text: Callable[[Row], str]) -> str:
    """Return a markdown table: a row for each config and batch size, a column for each length."""
    lengths = sorted({row["seqlen"] for row in rows})
    cells: dict[tuple[str, int], dict[int, str]] = {}
    for row in rows:
        cells.setdefault((row["config"], row["batch_size"]), {})[row["seqlen"]] = text(row)
    lines = [
        f"| {head} | batch | {' | '.join(map(format_length, lengths))} |",
        f"|---|---|{'---|' * len(lengths)}",
    ]
    for (config, batch_size), line in cells.items():
        shown = " | ".join(line.get(length, "-") for length in lengths)
        lines.append(f"| {config} | {batch_size} | {shown} |")
    return "\n".join(lines)


def speed_of(kind: str, row: Row) -> str:
    cost = row[kind]
    if cost["ms"] is None:
        return cost["problem"]
    share = "" if cost["share"] is None else f" ({100 * cost['share']:.0f}%)"
    return f"{cost['tokens_per_s']:,.0f}{share}"


def write_report(results: Sequence[dict[str, Any]], claims_file: Path, out: Path) -> None:
    """Write the report, its figure and its data, and print the verdicts."""
    spec = load_config_file(claims_file)
    claims = [dataclass_from_dict(RatioClaim, claim) for claim in spec.get("claims", [])]
    rows = [row for result in results for row in result["rows"]]
    verdicts = [(claim, *judge(claim, rows)) for claim in claims]
    for claim, ours, verdict in verdicts:
        print(f"{verdict}: {claim.claim} {claim.column}: {ours}")
    before = [f"# {out.stem}: {spec.get('question', '')}", format_verdicts(verdicts, RULE)]
    facts = {
        "Dtype": {r["dtype"] for r in results},
        "Measured": {measured(r["plan"]) for r in results},
        "Refused": {f"{name}: {why}" for r in results for name, why in r["refused"].items()},
    }
    after = [
        "Tokens/s of all sequences, medians. Decode: share of the copy's bandwidth. Prefill: share "
        "of the matrix product's FLOP/s. Cache: MiB of one sequence.",
        format_table(rows, "decode", lambda row: speed_of("decode", row)),
        format_table(rows, "prefill", lambda row: speed_of("prefill", row)),
        format_table(
            [row for row in rows if row["batch_size"] == rows[0]["batch_size"]],
            "cache",
            lambda row: f"{row['cache_mib']:,.2f}",
        ),
        format_facts(PREFILL, results, facts),
    ]
    write_files(out, rows, lambda figure: draw(results, figure), before, after)


def measured(plan: dict[str, Any]) -> str:
    return (
        f"{plan['repeats']} repeats of {plan['decode_tokens']} steps, {plan['warmup']} warm-up "
        f"runs, {'compiled' if plan['compiled'] else 'eager'}, decode "
        f"{'by' if plan['cuda_graph'] else 'without'} CUDA graph"
    )


def main(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="python -m apps.LT2.scripts.benchmark_report",
        description=(__doc__ or "").splitlines()[0],
    )
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULT.json")
    add("--out", type=Path, required=True, metavar="MD", help="report to write")
    add("--claims", type=Path, metavar="YAML", help="claims about prefill and decode")
    add("--reference", metavar="NAME", help="training: the recipe that ratios are relative to")
    args = parser.parse_args(argv)
    if args.out.suffix != ".md":
        raise UserError(f"--out {args.out} must end in .md")
    program, results = read_results(args.results)
    if not any(result["rows"] for result in results):
        raise UserError(f"{args.results[0]}: no point was measured")
    make_writable("--out", args.out.parent)
    unread = "claims" if program == TRAIN else "reference"
    if getattr(args, unread) is not None:
        logger.warning("--%s has no effect on results of %s", unread, program)
    if program == TRAIN:
        write_train_report(results, args.reference, args.out)
    else:
        write_report(results, args.claims or CLAIMS, args.out)


if __name__ == "__main__":
    run_cli(main)
