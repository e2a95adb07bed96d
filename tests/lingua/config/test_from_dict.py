"""Errors of a section name the option by its full dotted path."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from lingua.args import dataclass_from_dict
from lingua.config.from_dict import with_path
from lingua.errors import UserError


@dataclass
class Section:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"size={self.size} must be at least 1, such as size=8")


@dataclass
class Part:
    section: Section = field(default_factory=Section)


@dataclass
class Program:
    part: Part = field(default_factory=Part)


def test_a_section_is_named_by_its_full_path():
    with pytest.raises(UserError, match=r"^size=0 must be at least 1, such as size=8$"):
        Section(size=0)
    for cls, data, path in (
        (Section, {"size": 0}, ""),
        (Part, {"section": {"size": 0}}, "section."),
        (Program, {"part": {"section": {"size": 0}}}, "part.section."),
    ):
        with pytest.raises(UserError) as caught:
            dataclass_from_dict(cls, data)
        assert str(caught.value) == f"{path}size=0 must be at least 1, such as {path}size=8"


@pytest.mark.parametrize(
    "message, want",
    [
        ("limit=3: bad", "eval.harness.limit=3: bad"),
        (
            "harness.limit is empty: harness.limit=3",
            "eval.harness.limit is empty: eval.harness.limit=3",
        ),
        ("eval.harness.limit=3: bad", "eval.harness.limit=3: bad"),
        ("model.eval.harness.limit=3: bad", "model.eval.harness.limit=3: bad"),
        ("limit=3: harness.limit and sublimit", "eval.harness.limit=3: harness.limit and sublimit"),
        ("no such file", "no such file"),
        ("/a/limit: no such file", "/a/limit: no such file"),
    ],
)
def test_only_the_name_of_an_own_option_is_completed(message, want):
    assert with_path(message, "eval.harness.", {"limit"}) == want
