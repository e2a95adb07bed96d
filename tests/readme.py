"""The commands and programs in README.md, docs/*.md and quickstart.sh, by section."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from apps.LT2.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Guides, in the order in which a reader needs them. LOG.md and benchmarks/ record past commands.
GUIDES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md"),
]
RECIPE = "apps/LT2/configs/600M/debug.yaml"


class Command(NamedTuple):
    section: str  # "docs/data.md: Prepare a corpus", or the heading alone in README
    text: str  # as typed, with continuation lines joined

    @property
    def words(self) -> list[str]:
        return shlex.split(self.module_form, comments=True)

    @property
    def module_form(self) -> str:
        """The text, with `python -m MODULE` for `lt2 COMMAND`."""
        for name, (module, _) in COMMANDS.items():
            if f"{self.text} ".startswith(f"lt2 {name} "):
                return f"python -m {module}{self.text[len(f'lt2 {name}') :]}"
        return self.text


def sections() -> dict[str, str]:
    """Text of each section of the second level, and of each guide's start, by name."""
    found = {}
    for path in GUIDES:
        place = "" if path.name == "README.md" else f"{path.relative_to(ROOT)}: "
        start, *rest = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.M)
        found[f"{place}start"] = start
        for section in rest:
            heading, _, body = section.partition("\n")
            found[place + heading] = body
    # what quickstart.sh prints at its end
    script = (ROOT / "setup/quickstart.sh").read_text(encoding="utf-8")
    printed = script.rpartition("Try next")[2].partition("\n")[2].partition("EOF")[0]
    for written, shown in (("$RECIPE", RECIPE), ("$RUN", "runs/quickstart"), ("\\\\", "\\")):
        printed = printed.replace(written, shown)
    found["setup/quickstart.sh"] = f"```bash\n{printed}```"
    return found


SECTIONS = sections()


def programs(section: str) -> list[str]:
    """The Python programs of a section."""
    return re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S)


def commands() -> list[Command]:
    """Every command of every ```bash block, in order, without comments."""
    found = []
    for section, body in SECTIONS.items():
        for block in re.findall(r"```bash\n(.*?)```", body, re.S):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if shlex.split(line, comments=True):
                    found.append(Command(section, line.strip()))
    return found
