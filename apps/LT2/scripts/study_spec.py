"""Read a study from its YAML file.

A study without a recipe (`config`) is merged over configs/studies/defaults.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apps.LT2.matching import BY, QUANTITIES
from lingua.args import dataclass_from_dict, load_config_file
from lingua.errors import UserError

STUDIES = Path(__file__).parents[1] / "configs" / "studies"
DEFAULTS = "defaults.yaml"  # what studies leave out; not a study


@dataclass
class Study:
    """A study at one size. Options are dotted names of TrainArgs, without `dump_dir` and `seed`."""

    name: str
    question: str
    arms: dict[str, Any]  # name to options; the first is the reference of match and equal
    config: str  # recipe, relative to the file of the study
    options: dict[str, Any] = field(default_factory=dict)  # of all runs
    over: dict[str, Any] = field(default_factory=dict)  # option to values; every arm runs with each
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
        raise UserError(f"{name or 'no study given'}: use {', '.join(known)}, or a YAML file")
    given = load_config_file(file)
    # The defaults fit the recipe of the defaults alone.
    folder = file if "config" in given else STUDIES / DEFAULTS
    defaults = {"sizes": {"small": {}}} if folder == file else load_config_file(folder)
    own, common = given.pop("sizes", {}), defaults.pop("sizes")
    sizes = list(common | own)
    if size not in sizes:
        raise UserError(f"size={size} must be one of {', '.join(sizes)}")
    parts = [defaults, given, common.get(size, {}), own.get(size, {})]
    merged = {key: value for part in parts for key, value in part.items()}
    merged["options"] = {k: v for part in parts for k, v in part.get("options", {}).items()}
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
    return study
