"""Collect what a run folder says, as rows for the page of apps.LT2.scripts.report."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import statistics
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from apps.LT2.pattern import LayerSpec, choose_letters
from apps.LT2.scripts.figure import MAX_LABELS, MORE_COLOURS
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.args import dataclass_from_dict, flatten_dict, load_config_file
from lingua.config.help import format_value
from lingua.errors import UserError
from lingua.evaluations import Evaluation
from lingua.files.jsonl_log import read_jsonl_records
from lingua.runs import Run
from lingua.slurm.code import CODE_VERSION
from lingua.slurm.script import SUBMIT_SCRIPT

# <option> is replaced by its value. A row whose first option is missing or null is skipped.
TRAINED = {
    "Model": "<model.n_layers> layers x <model.loop_count> loops, dim <model.dim>",
    "Mixer": "<model.mixer>",
    "Pattern": "<model.attention_pattern>",
    "Data": "<data.sources> in <data.root_dir>",
    "Task": "<task>",
    "Tokenizer": "<tokenizer>, vocabulary <model.vocab_size>",
    "Tokens per step": "<tokens_per_step>: batch_size <data.batch_size> x seq_len <data.seq_len> "
    "x grad_acc_steps <grad_acc_steps> x data-parallel ranks <n_ranks>",
    "Optimizer": "<optim.name>, lr <optim.lr>, weight decay <optim.weight_decay>, "
    "<optim.scheduler> schedule, warm-up <optim.warmup> steps",
    "Seed": "<seed>",
    "Initial weights": "<checkpoint.init_ckpt_path>",
}
OPTION = re.compile(r"<([\w.]+)>")
LOSSES = {
    "loss/out": "training loss",
    "loss/val": "validation loss",
    "loss/val_bpb": "bits per byte",
}
BATCH_FACTORS = ("data.batch_size", "data.seq_len", "grad_acc_steps")
RANK_FACTORS = ("dp_replicate", "dp_shard", "tp_size")
VERSIONS = "environment/versions"
MAX_ANSWERS = 2  # shown of a task
MAX_TEXT = 400  # characters of a prompt or answer

Rows = list[tuple[str, str]]


# ---- numbers


def values_of(run: Run, key: str) -> dict[int, float]:
    """Return the finite values of a metric by step."""
    return {step: v for step, v in sorted(run.metrics.get(key, {}).items()) if v is not None}


def main_numbers(run: Run) -> tuple[list[dict[str, str]], list[str]]:
    """Return name, value and note of the main numbers, and the names of those not recorded."""
    found: list[dict[str, str]] = []
    missing: list[str] = []

    def add(name: str, key: str, show: Callable[[list[float]], str], note: str = "") -> None:
        if values := list(values_of(run, key).values()):
            note = note.format(n=len(values), last=values[-1])
            found.append({"name": name, "value": show(values), "note": note})
        elif note != "if known":
            missing.append(name)

    add("parameters", "model/parameters", lambda v: f"{v[-1]:,}")
    add("training tokens", "optim/total_tokens", lambda v: f"{v[-1]:,}")
    add("training FLOPs", "optim/total_flops", lambda v: re.sub(r"e\+0*", "e", f"{v[-1]:.3g}"))
    add("training time", "time/elapsed", lambda v: _duration(v[-1]))
    for key, name in LOSSES.items():
        if key in run.metrics:
            found.append({"name": name} | _loss(run, key))
        else:
            missing.append(name)
    speed = "speed/tokens_per_s"
    add("tokens/s", speed, lambda v: f"{statistics.median(v):,.0f}", "median; last {last:,.0f}")
    if "speed/mfu" in run.metrics:
        add("MFU", "speed/mfu", lambda v: f"{statistics.median(v):.1%}", "median; last {last:.1%}")
    if "memory/max_active_gib" in run.metrics:
        add("GPU memory", "memory/max_active_gib", lambda v: f"{max(v):.1f} GiB", "peak, one GPU")
    return found, missing


def _loss(run: Run, key: str) -> dict[str, str]:
    """Return the last value of a loss, and a note with the lowest one."""
    values, finite = run.metrics[key], values_of(run, key)
    step, last = max(values.items())
    note = f"step {step:,}"
    if finite:
        best = min(finite, key=lambda step: (finite[step], -step))
        note += f"; lowest {finite[best]:.4f} at {best:,}" if best != step else "; the lowest"
    if len(finite) < len(values):
        note += f"; {len(values) - len(finite)} of {len(values)} not finite"
    return {"value": "not finite" if last is None else f"{last:.4f}", "note": note}


def _duration(seconds: float) -> str:
    return re.sub(" days?,", " d", str(timedelta(seconds=round(seconds))))


def status(run: Run) -> str:
    """Say how far the run is, and whether a process is training it."""
    steps = run.options.current.get("steps")
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    return f"{run.status}: {run.step:,}{of} steps" + (f"; {run.error}" if run.error else "")


# ---- the run


def trained(run: Run) -> Rows:
    """Return the rows of what was trained, from the options."""
    options = dict(run.options.current)
    weights, task = (
        {k.removeprefix(prefix): v for k, v in options.items() if k.startswith(prefix)}
        for prefix in ("data.sources.", "data.task.")
    )
    named = ", ".join(f"{k}: {format_value(v)}" for k, v in weights.items())
    options["data.sources"] = named or options.get("data.sources") or None  # not {}
    given = {k: v for k, v in task.items() if v is not None}
    options["task"] = ", ".join(f"{k}={format_value(v)}" for k, v in given.items()) or None
    names = ("data.tokenizer.path", "data.tokenizer.name")
    options["tokenizer"] = None if given else next(filter(None, map(options.get, names)), None)
    with suppress(KeyError):
        factors = [options[name] for name in BATCH_FACTORS]
        options["n_ranks"] = math.prod(options[f"distributed.{n}"] for n in RANK_FACTORS[:2])
        options["tokens_per_step"] = f"{math.prod(factors) * options['n_ranks']:,}"
    rows = []
    for name, text in TRAINED.items():
        if options.get(OPTION.findall(text)[0]) is not None:
            shown = OPTION.sub(lambda m: format_value(options.get(m[1])), text)
            rows.append((name, shown))
    return rows


def layout(run: Run) -> dict[str, Any] | None:
    """Return rows of cells (letter, mixer, colour) and their legend, or None without a model."""
    try:
        model = load_config_file(run.path / "config.yaml")["model"]
        plan = dataclass_from_dict(LoopedTransformerArgs, model, strict=False).layout_plan()
    except (OSError, KeyError, UserError):
        return None
    loops = plan.draw(None)
    letters = choose_letters(loops)
    colours = {spec: MORE_COLOURS[i % MAX_LABELS] for i, spec in enumerate(letters)}

    def cell(spec: LayerSpec) -> dict[str, Any]:
        count = sum(loop.count(spec) for loop in loops)
        entry = {"letter": letters[spec], "mixer": str(spec), "count": count}
        return entry | {"colour": colours[spec]}

    return {
        "rows": [
            (f"loop {i}" + "*" * (i in plan.random_loops), [cell(spec) for spec in loop])
            for i, loop in enumerate(loops)
        ],
        "legend": [cell(spec) for spec in letters],
        "is_random": bool(plan.random_loops),
    }


def environment(run: Run) -> Rows:
    """Return what the run has recorded about its code, machine and time."""
    rows: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        code = json.loads((run.path / CODE_VERSION).read_text(encoding="utf-8"))
        changed = ", with uncommitted changes" if code.get("dirty") else ""
        rows["Commit"] = f"{code['commit']}{changed}" if code.get("commit") else "not in git"
        rows["Code"] = code.get("root")
    with suppress(OSError):
        log = (run.path / "train.log").read_text(encoding="utf-8", errors="replace")
        devices = re.findall(r"^ +devices +(.+)$", log, re.MULTILINE)
        rows["Devices"] = devices[-1] if devices else None
    file = run.path / "metrics.jsonl"
    records = read_jsonl_records(file) if file.is_file() else []
    versions = [record[VERSIONS] for record in records if VERSIONS in record]
    rows["Versions"] = versions[-1] if versions else None
    if times := [record["created_at"] for record in records if "created_at" in record]:
        rows["Records"] = " to ".join(_minute(time) for time in (times[0], times[-1]))
    rows["Folder"] = run.path.resolve()
    return [(name, str(value)) for name, value in rows.items() if value]


def _minute(time: str) -> str:
    return datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M %Z")


def resume_command(run: Run) -> str:
    script = run.path / SUBMIT_SCRIPT
    if script.exists():
        return f"sbatch {shlex.quote(str(script))}    # bash without SLURM"
    sizes = [run.options.current.get(f"distributed.{name}", 1) for name in RANK_FACTORS]
    n_ranks = math.prod(sizes)
    start = f"torchrun --nproc-per-node {n_ranks}" if n_ranks > 1 else "python"
    options = [f"config={run.path / 'config.yaml'}"]
    before = Path(run.options.current.get("dump_dir") or run.path)
    if before.resolve() != run.path.resolve():  # the folder has moved
        options.append(f"dump_dir={run.path}")
        if Path(run.options.current.get("checkpoint.path") or before).is_relative_to(before):
            options.append("checkpoint.path=null")
    return f"{start} -m apps.LT2.train {shlex.join(options)}"


# ---- evaluations

VALIDATION_NAMES = {
    "loss/val": "nats per token",
    "loss/val_bpb": "bits per byte",
    "acc/val": "accuracy",
    "ppl/val": "perplexity",
}


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Return an entry for each evaluation: step, options, how it was made, and rows of scores."""
    entries = []
    for found in sorted(run.evaluations, key=lambda e: (e.step or 0, e.label)):
        made_with = flatten_dict(found.made_with, sep=".")
        chosen = {k: format_value(v) for k, v in made_with.items() if v not in (None, "", [], {})}
        entry = {"step": found.step, "options": found.label, "made_with": list(chosen.items())}
        entries.append(entry | {"rows": score_rows(found)})
    return entries


def score_rows(found: Evaluation) -> list[dict[str, Any]]:
    """Return a row for each score: task, metric, score, error, chance, questions."""
    rows = []
    for key, score in found.scores.items():
        task, _, metric = key.rpartition("/")
        name, _, filtered = metric.partition(",")
        if key in VALIDATION_NAMES:
            task, name = "held-out text", VALIDATION_NAMES[key]
        elif not filtered or name.endswith("_stderr"):
            continue
        rows.append(
            {
                "task": task,
                "metric": f"{name} ({filtered})" if filtered not in ("", "none") else name,
                "score": score,
                "error": found.scores.get(f"{task}/{name}_stderr,{filtered}"),
                "chance": found.chance.get(f"{task}/{name}"),
                "questions": found.scores.get(f"{task}/sample_len", ""),
            }
        )
    return rows


def recorded_answers(run: Run) -> list[dict[str, str]]:
    """Return the first answers that the model wrote in each task, of harness.log_samples=true."""
    found = []
    for file in sorted(run.path.glob("evals/*/samples_*.jsonl")):
        task = file.stem.removeprefix("samples_").rpartition("_")[0]
        for sample in itertools.islice(read_jsonl_records(file), MAX_ANSWERS):
            request = next(iter(sample["arguments"].values()), {})
            if not isinstance(request.get("arg_1"), dict):  # a choice is scored, not written
                break
            found.append(
                {
                    "note": f"{file.parent.name}, {task}, expected: {sample['target']}"[:MAX_TEXT],
                    "prompt": _tail(request["arg_0"]),
                    "answer": str(sample["resps"][0][0])[:MAX_TEXT],
                }
            )
    return found


def _tail(text: str) -> str:
    return text if len(text) <= MAX_TEXT else "... " + text[-MAX_TEXT:]
