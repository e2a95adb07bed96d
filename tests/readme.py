"""README.md as data: the commands of its shell blocks, by section."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Command(NamedTuple):
    section: str  # "Train": the heading above it, of the second level
    text: str  # as it is typed, continuation lines joined

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def readme_programs(section: str) -> list[str]:
    """The Python programs of a section."""
    body = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", body, re.S)


def readme_commands() -> list[Command]:
    """Every command of every ```bash block, in the order of the page; comments are left out."""
    commands = []
    for section in re.split(r"^## ", README, flags=re.M)[1:]:
        heading = section.partition("\n")[0]
        for block in re.findall(r"```bash\n(.*?)```", section, re.S):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if shlex.split(line, comments=True):
                    commands.append(Command(heading, line.strip()))
    return commands
