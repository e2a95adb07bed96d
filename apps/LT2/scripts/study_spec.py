"""Read a study from its YAML file.

A study without a recipe (`config`) is merged over configs/studies/defaults.yaml.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apps.LT2.matching import BY, QUANTITIES
from lingua.args import dataclass_from_dict, load_config_file
from lingua.errors import UserError

STUDIES = Path(__file__).parents[1] / "configs" / "studies"
DEFAULTS = "defaults.yaml"  # what studies leave out; not a study
SET_BY_STUDY = ("config", "dump_dir", "name", "seed", "model.seed", "data.seed")


@dataclass
class Study:
    """A study at one size. Options are dotted names of TrainArgs, without `dump_dir` and `seed`."""

    name: str
    question: str
    arms: dict[str, dict[str, Any]]  # name to options; the first: reference of match and equal
    config: str  # recipe, relative to the file of the study
    options: dict[str, Any] = field(default_factory=dict)  # of all runs
    over: dict[str, list[Any]] = field(default_factory=dict)  # option to values, for every arm
    seeds: int = 3  # 1, 2, ...
    match: str | None = None  # parameters | flops: make the models equal to the first
    by: str = "ffn"  # what match changes
    equal: str = "steps"  # steps | flops: change the steps until all training FLOPs are equal
    columns: dict[str, str] = field(default_factory=dict)  # header to metric; see study_report.py
    plots: list[dict[str, Any]] = field(default_factory=list)  # options of apps.LT2.scripts.plot
    claims: list[dict[str, Any]] = field(default_factory=list)  # see study_report.Claim
    size: str = "small"
    sizes: list[str] = field(default_factory=list)  # that the study has


def read_study(name: str, size: str) -> Study:
    """Read a study by name or file, with the options of `size`."""
    known = sorted(path.stem for path in STUDIES.glob("*.yaml") if path.name != DEFAULTS)
    file = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if not file.is_file():
        if name == "curriculum":
            raise UserError("curriculum is not a study; use lt2 curriculum")
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"use {', '.join(known)}, or a YAML file"
        problem = "no such file; " if file == Path(name) else ""
        raise UserError(f"{name or 'no study given'}: {problem}{advice}")
    given = load_config_file(file)
    # The defaults fit the recipe of the defaults alone.
    folder = file if "config" in given else STUDIES / DEFAULTS
    defaults = {"sizes": {"small": {}}} if folder == file else load_config_file(folder)
    own, common = section(file, given, "sizes"), defaults.pop("sizes")
    given.pop("sizes", None)
    sizes = list(common | own)
    if size not in sizes:
        raise UserError(f"size={size} must be one of {', '.join(sizes)}")
    parts = [defaults, given, common.get(size, {}), section(file, own, size)]
    merged = {key: value for part in parts for key, value in part.items()}
    merged["options"] = {k: v for part in parts for k, v in section(file, part, "options").items()}
    merged["config"] = str((folder.parent / merged["config"]).resolve())
    try:
        study = dataclass_from_dict(
            Study, {"name": file.stem, "size": size, "sizes": sizes, **merged}
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    choices = {"equal": ("steps", "flops"), "match": (None, *QUANTITIES), "by": tuple(BY)}
    for option, among in choices.items():
        if (value := getattr(study, option)) not in among:
            raise UserError(f"{file}: {option}={value} must be one of {', '.join(map(str, among))}")
    try:
        check_runs(study)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return study


def section(file: Path, of: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the mapping `key`, empty if missing or null."""
    found = of.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"{file}: {key}={found} must be a mapping")
    return found


def check_runs(study: Study) -> None:
    """Raise UserError unless arms, `over` and seeds make different runs."""
    if not study.arms:
        raise UserError("arms is empty; name at least one arm")
    if study.seeds < 1:
        raise UserError(f"seeds={study.seeds} must be at least 1")
    of_arms = {option for options in study.arms.values() for option in options}
    for option, values in study.over.items():
        if not values or any(value in values[:i] for i, value in enumerate(values)):
            raise UserError(f"over: {option} must have one or more different values")
        if option in of_arms:
            raise UserError(f"{option} is in over and in an arm; leave one out")
    for option in (*of_arms, *study.over, *study.options):
        if option in SET_BY_STUDY:
            raise UserError(f"{option} is set by the study; leave it out")
    if study.equal == "flops" and "steps" in (*of_arms, *study.over):
        raise UserError("equal=flops sets the steps of arms; leave steps out, or use equal=steps")
