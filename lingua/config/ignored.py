"""Options of Lingua and of older versions that are still accepted, and ignored with a warning."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

IGNORED = {  # section.option -> why
    "distributed.float8_filter": "float8 is not implemented",
    "distributed.float8_recipe": "float8 is not implemented",
    "eval.dataset_dir": "validation reads data.root_dir, or eval.validation.root_dir",
    "harness.check_integrity": "lm_eval has no integrity check",
    "harness.device": "the model is already on its device",
    "optim.annealing_step": "it has no effect in Lingua either",
    "wandb.anonymous": "wandb does not support it",
    "wandb.monitor_gym": "LT2 has no Gym environments",
    "wandb.tensorboard": "use wandb.sync_tensorboard",
}


def why_ignored(name: str) -> str | None:
    """Look up a dotted name by its last two parts; None if the option is not ignored."""
    return IGNORED.get(".".join(name.split(".")[-2:]))


def ignore(name: str, value: Any) -> bool:
    """Return whether the option is ignored. Warn about it once, unless its value is null."""
    reason = why_ignored(name)
    if reason is not None and value not in (None, "null"):
        _warn(f"{name} is ignored: {reason}")
    return reason is not None


@cache
def _warn(message: str) -> None:
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) == "0":
        logger.warning(message)
