"""Read what evaluations of a run have measured, with the options that they were made with.

Every record of metrics.eval.jsonl and metrics.validation.jsonl has the keys MADE_WITH (all options
that change a score) and DIFFERS (those that are not the run's own). Records of older versions have
neither.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingua.args import flatten_dict
from lingua.config.help import format_value
from lingua.files.jsonl_log import read_jsonl_records

MADE_WITH, DIFFERS, CHANCE = "made_with", "differs_from_run", "chance"
ENDED_BY = "ended_by"  # in metrics.jsonl: the option that ended a run before its last step
EVAL_LOG, VALIDATION_LOG = "metrics.eval.jsonl", "metrics.validation.jsonl"
UNKNOWN = "options unknown"  # label of older records
MAX_LABEL = 150  # bytes; file systems allow 255


def label_of(options: Mapping[str, Any], among: Collection[str] = ()) -> str:
    """Name a folder after options. Different options have different names.

    `among` are the options of all folders that need different names.
    """
    short = [option.rpartition(".")[2] for option in options]
    all_short = [option.rpartition(".")[2] for option in among or options]
    names = short if len(set(all_short)) == len(all_short) else list(options)
    values = map(format_value, options.values())
    text = ",".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    label = re.sub(r"[^\w.,=+-]+", "_", text, flags=re.ASCII)[:MAX_LABEL]
    return label if label == text else f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Evaluation:
    step: int | None
    label: str  # "" with the run's own options, else e.g. "loop_count=4"
    scores: dict[str, float]  # "loss/val" in nats per token, "hellaswag/acc,none"
    chance: dict[str, float]  # chance level, by task and metric: "hellaswag/acc"
    made_with: dict[str, Any] = field(default_factory=dict)  # empty in older records
    differs: dict[str, Any] = field(default_factory=dict)  # options that are not the run's own
    flops_per_token: int | None = None  # of a forward pass; None in older records


def read_evaluations(run: Path, *logs: str) -> list[Evaluation]:
    """Return the evaluations in the order of the files; of equal step and options, the newest.

    Older records have the label UNKNOWN. `logs` defaults to both files.
    """
    found: dict[Any, Evaluation] = {}
    for name in logs or (EVAL_LOG, VALIDATION_LOG):
        for record in read_jsonl_records(run / name) if (run / name).exists() else []:
            made_with = record.pop(MADE_WITH, None)
            differs = record.pop(DIFFERS, {})
            label = UNKNOWN if made_with is None else label_of(differs)
            flops, _ = record.pop("flops_per_token", None), record.pop("loops", None)
            step, chance = record.pop("global_step", None), _numbers(record.pop(CHANCE, {}))
            scores = _numbers(record)
            key = (name, step, label, *scores)  # two lists of tasks may both be the run's own
            found.pop(key, None)
            found[key] = Evaluation(step, label, scores, chance, made_with or {}, differs, flops)
    return list(found.values())


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    flat = flatten_dict(record, sep="/")
    return {k: v for k, v in flat.items() if isinstance(v, int | float)}
