"""Keep secrets out of logs, configs, checkpoints and dashboards."""

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
MIN_SECRET_CHARS = 8  # shorter values would hide ordinary words


def redact(text: str, secrets: Mapping[str, str] | None = None) -> str:
    """Hide strings that look like tokens, and `secrets` (name to value).

    By default, `secrets` are the environment variables with the name of a secret.
    """
    for name, value in (find_secrets() if secrets is None else secrets).items():
        text = text.replace(value, f"<{name} hidden>")
    return SECRET_SHAPE.sub("<token hidden>", text)


def redact_all(value: Any, secrets: Mapping[str, str] | None = None) -> Any:
    """Apply `redact` to every string in nested plain containers, such as a config."""
    secrets = find_secrets() if secrets is None else secrets
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, Mapping):
        return {redact_all(k, secrets): redact_all(v, secrets) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(item, secrets) for item in value]
    return value


def find_secrets() -> dict[str, str]:
    variables = os.environ.items()
    return {k: v for k, v in variables if len(v) >= MIN_SECRET_CHARS and SECRET_NAME.search(k)}
