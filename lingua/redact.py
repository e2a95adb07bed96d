"""Secrets stay out of what a run writes: logs, configs, checkpoints, dashboards."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

SECRET_NAME = re.compile(
    r"(^|_)(API_?KEY|ACCESS_KEY|SECRET_KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.I
)
SECRET_SHAPE = re.compile(
    r"\b(?:(?:hf_|ghp_|github_pat_|sk-|wandb_v1_)[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{16}\b)"
)
MIN_SECRET_CHARS = 8  # shorter values would blot out ordinary words


def redact(text: str) -> str:
    """`text` without the values of secret environment variables and without known token shapes."""
    return _hide(text, _secrets())


def redact_all(value: Any) -> Any:
    """The same for every text in nested plain containers, such as a config that was resolved."""
    return _hide_all(value, _secrets())


def _secrets() -> dict[str, str]:
    """Value -> name of the variable that holds it."""
    return {
        value: name
        for name, value in os.environ.items()
        if len(value) >= MIN_SECRET_CHARS and SECRET_NAME.search(name)
    }


def _hide(text: str, secrets: dict[str, str]) -> str:
    for value, name in secrets.items():
        text = text.replace(value, f"<{name} hidden>")
    return SECRET_SHAPE.sub("<token hidden>", text)


def _hide_all(value: Any, secrets: dict[str, str]) -> Any:
    if isinstance(value, str):
        return _hide(value, secrets)
    if isinstance(value, Mapping):
        return {_hide_all(key, secrets): _hide_all(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide_all(item, secrets) for item in value]
    return value
