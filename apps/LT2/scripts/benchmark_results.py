"""Read results of the benchmarks, and write the files of a report about them."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lingua.errors import UserError
from lingua.files.atomic import write_atomic
from lingua.files.jsonl_log import json_line
from lingua.runs import natural_key

logger = logging.getLogger(__name__)

PREFILL, TRAIN = "apps.LT2.benchmark_prefill", "apps.LT2.scripts.benchmark_train"
FIELDS = {PREFILL: "decode", TRAIN: "tokens_per_s"}  # which every row of a result has

Result = dict[str, Any]


def read_results(
    paths: Sequence[Path], programs: Sequence[str] = (PREFILL, TRAIN)
) -> tuple[str, list[Result]]:
    """Read results of one of `programs`. Return its module and the results.

    A file has the output of the benchmark, or only its last line (JSON).
    """
    found: dict[str, list[Result]] = {}
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        except OSError as error:
            raise UserError(f"{path} is not readable: {error.strerror}") from None
        except (IndexError, ValueError) as error:
            raise UserError(f"{path}: the last line is not readable as JSON: {error}") from None
        program = next((p for p in programs if _is_result(result, FIELDS[p])), None)
        if program is None:
            raise UserError(f"{path}: the last line is not a result of {' or '.join(programs)}")
        found.setdefault(program, []).append(result)
    if len(found) > 1:
        raise UserError(f"{paths[0]}, ...: results of {' and '.join(found)} need separate reports")
    return found.popitem()


def _is_result(result: Any, field: str) -> bool:
    rows = result.get("rows") if isinstance(result, dict) else None
    return isinstance(rows, list) and all(isinstance(row, dict) and field in row for row in rows)


def write_files(
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    draw: Callable[[Path], None],
    before: Sequence[str],
    after: Sequence[str],
) -> None:
    """Write NAME.md with the figure between `before` and `after`, NAME.png and NAME.jsonl."""
    data, figure = out.with_suffix(".jsonl"), out.with_suffix(".png")
    write_atomic(data, "".join(map(json_line, rows)))
    try:
        draw(figure)
    except UserError as error:  # another machine may draw it
        logger.warning("%s is not drawn: %s", figure, error)
    shown = f"![{out.stem}]({figure.name})" if figure.exists() else ""
    link = f"- Each point, with quartiles and memory: [{data.name}]({data.name})"
    parts = [part for part in (*before, shown, *after) if part]
    write_atomic(out, "\n\n".join(parts) + f"\n{link}\n")
    print(f"report: {out}")


def format_facts(program: str, results: Sequence[Result], own: Mapping[str, set[str]]) -> str:
    """Return the commands, and a list of facts: about the environment, and `own`."""
    lines = [f"{launcher(r)} -m {program} {shlex.join(r['argv'])}" for r in results if "argv" in r]
    facts = {
        "Device": {r["device"] for r in results},
        "Commit": {
            (r["commit"] or "unknown")
            + ", with uncommitted changes" * bool(r["uncommitted_changes"])
            for r in results
        },
        "Versions": {r.get("versions") or f"torch {r['torch']}" for r in results},
        **own,
    }
    shown = [
        f"- {name}: {'; '.join(sorted(values, key=natural_key))}"
        for name, values in facts.items()
        if values
    ]
    return "\n".join(["```bash", *lines, "```", "", *shown])


def launcher(result: Result) -> str:
    n_ranks = max((row.get("n_ranks", 1) for row in result["rows"]), default=1)
    return "python" if n_ranks == 1 else f"torchrun --nproc-per-node {n_ranks}"
