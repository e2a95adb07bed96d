"""A config with an option of every supported type."""
# ruff: noqa: UP006, UP035, UP045  (older configs spell types as typing.Optional and typing.Dict)

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional

import pytest

from lingua.args import parse_args
from lingua.errors import UserError


@dataclass
class Every:
    every: int = 1000  # steps between two
    keep: int = 0


@dataclass
class Data:
    root_dir: Optional[str] = None  # folder of the sources
    sources: Dict[str, float] = field(default_factory=dict)  # source -> weight
    seq_len: int = 2048
    until: List[str] = field(default_factory=list)


@dataclass
class Optim:
    lr: float = 3e-4  # peak rate
    clip: float | None = 1.0

    def __post_init__(self):
        if self.lr <= 0:
            raise UserError(f"optim.lr={self.lr} must be above 0, for example 3e-4")


@dataclass
class Eval:
    data: Data = field(default_factory=Data)
    limit: Optional[int] = None


@dataclass
class Args:
    # What the run
    # is called
    name: str = "lingua"
    steps: int = (
        1000  # optimizer steps
    )  # fmt: skip
    fused: bool = True
    mode: Literal["fast", "exact"] = "fast"
    data: Data = field(default_factory=Data)  # where text comes from
    optim: Optim = field(default_factory=Optim)
    dump: Every = field(default_factory=lambda: Every(every=50))
    eval: Optional[Eval] = None  # null = no evaluation
    free: Any = None
    grid: dict[str, list[Any]] = field(default_factory=dict)
    folder: Path = Path("runs")
    width: str | int = "full"


def parse(*argv: str) -> Args:
    return parse_args(Args, argv, prog="prog")


def complaint(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message
