"""Compare the models of a sweep's runs, as the script's sibling module `describe` sees them.

It runs as one separate process, so that stool needs no torch for it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lingua.args import config_as_yaml
from lingua.config.help import format_value
from lingua.errors import UserError
from lingua.run_columns import short, shorten_layout
from lingua.slurm.run_list import Options
from lingua.slurm.run_names import name_group
from lingua.slurm.script import Job

TOLERANCE = 0.03  # of parameters and FLOPs


@dataclass(frozen=True)
class Size:
    layout: str
    depth: str  # layers x loops
    parameters: int  # with embeddings
    body: int  # parameters without embeddings
    flops: int  # per token in training
    overrides: tuple[str, ...]  # that `match` needs


# What may differ: an attribute of Size, and its words.
QUANTITIES = {"body": "parameters without embeddings", "flops": "training FLOPs per token"}


def read_sizes(jobs: Mapping[str, Job], match: str | None, by: str) -> dict[str, Size]:
    """Return the sizes of runs, by label; empty if the script has no `describe` or no models.

    `match` changes all models but the first. An error is a UserError with `match`; else it is
    printed, and the sizes are empty.
    """
    job = next(iter(jobs.values()))
    package = job.args.script.rpartition(".")[0]
    module = f"{package}.describe"
    if not package or importlib.util.find_spec(module) is None or not has_model(job):
        if match:
            raise UserError(f"match={match}: script={job.args.script} has no models to describe")
        return {}
    options = ["format=json", *([f"match={match}", f"by={by}"] if match and len(jobs) > 1 else [])]
    with TemporaryDirectory() as folder:
        for i, job in enumerate(jobs.values()):
            Path(folder, f"{i}.yaml").write_text(config_as_yaml(job.run_args), encoding="utf-8")
        configs = [f"config={folder}/{i}.yaml" for i in range(len(jobs))]
        command = [str(job.python), "-m", module, *configs, *options]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        error = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        error = error.removeprefix("error: ")
        index, _, text = error.partition(": ")
        if index.isdecimal():  # the name of a config
            error = f"{text} (in the run {list(jobs)[int(index)]})"
        if match:
            raise UserError(error)
        print(f"stool: the sizes of the models are unknown: {error}", flush=True)
        return {}
    described = json.loads(done.stdout).values()
    return {label: read_size(one) for label, one in zip(jobs, described, strict=True)}


def has_model(job: Job) -> bool:
    return hasattr(job.run_args, "model")


def may_differ(jobs: Mapping[str, Job]) -> bool:
    """Whether runs have different options of the model or another sequence length."""

    def options(run_args: Any) -> str:
        seq_len = getattr(getattr(run_args, "data", None), "seq_len", None)
        return repr((getattr(run_args, "model", None), seq_len))

    return len({options(job.run_args) for job in jobs.values()}) > 1


def read_size(described: Mapping[str, Any]) -> Size:
    count = described["parameters"]
    return Size(
        layout=shorten_layout("\n".join(described["layout"])),
        depth=f"{described['n_layers']}x{described['loop_count']}",
        parameters=count["total"],
        body=count["total"] - count["embedding"],
        flops=described["flops"]["training, per token"],
        overrides=tuple(described["overrides"]),
    )


def differences(
    sizes: Mapping[str, Size], runs: Mapping[str, Options], match: str | None
) -> Iterator[str]:
    """Yield a line for each quantity in which runs differ by more than TOLERANCE."""
    for attribute, words in QUANTITIES.items():
        values = {label: getattr(size, attribute) for label, size in sizes.items()}
        least, most = min(values.values()), max(values.values())
        if most > (1 + TOLERANCE) * least:
            ends = [
                f"{short(end)} in {name_group([k for k, v in values.items() if v == end], runs)}"
                for end in (least, most)
            ]
            quantity = "parameters" if attribute == "body" else "flops"
            hint = f"; to make them equal: match={quantity} by=ffn (or dim, n_layers)"
            yield (
                f"the models differ by {most / least - 1:.0%} in {words}: {ends[0]}, {ends[1]}"
                f"{'' if match else hint}"
            )


def format_sizes(sizes: Mapping[str, Size], runs: Mapping[str, Options]) -> str:
    """Format a table of models for this terminal. Runs of equal models share a row."""
    from rich.console import Console
    from rich.table import Table

    def name(members: list[str]) -> str:
        if len(members) > 1:
            return name_group(members, runs).removesuffix(f" ({len(members)} runs)")
        options = runs[members[0]].items()
        return " ".join(f"{o.rpartition('.')[2]}={format_value(v)}" for o, v in options)

    console = Console(markup=False, highlight=False)
    gap = 2 if console.width >= 100 else 1
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for header in ("run", "layout"):
        table.add_column(header, overflow="fold")
    for header in ("runs", "layers", "params", "without emb.", "FLOPs/token"):
        table.add_column(header, justify="right", no_wrap=True)
    first = next(iter(sizes.values()))
    labels: dict[Size, list[str]] = {}
    for label, size in sizes.items():
        labels.setdefault(size, []).append(label)
    for size, members in labels.items():
        cells = [_compared(getattr(size, name), getattr(first, name)) for name in QUANTITIES]
        counts = (str(len(members)), size.depth, short(size.parameters))
        table.add_row(name(members), size.layout, *counts, *cells)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _compared(value: float, reference: float) -> str:
    difference = value / reference - 1
    return short(value) + (f" ({difference:+.0%})" if abs(difference) >= 0.005 else "")
