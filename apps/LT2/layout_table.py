"""A layout as a person reads it: one letter a layer, layers across, loops down.

           0     5     10    15
loops 0-3  ggggF ggggF ggggF ggggF
g gdn (64)  F full (16)
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Collection

from apps.LT2.pattern import LayerSpec, Layout, Loop

WIDTH = 100  # columns
# Letters that stand out; other mixers take one of their own name.
PREFERRED_LETTERS = {"full": "F", "window": "wxyz"}


def format_layout(layout: Layout, random_loops: Collection[int] = ()) -> str:
    """The table, its legend, and which loops are redrawn each step. Equal loops share a line."""
    letters = choose_letters(layout)
    rows = [
        (label(run, random_loops), "".join(letters[spec] for spec in layout[run[0]]))
        for run in runs_of_equal_loops(layout, random_loops)
    ]
    lines = [*bands(rows), *legend(layout, letters)]
    if random_loops:
        lines.append("* order drawn anew each training step; shown is that of evaluation")
    return "\n".join(lines)


def choose_letters(layout: Layout) -> dict[LayerSpec, str]:
    """A letter of its own for every spec, in the order in which they first appear."""
    letters: dict[LayerSpec, str] = {}
    for spec in itertools.chain(*layout):
        if spec not in letters:
            preferred = PREFERRED_LETTERS.get(spec.mixer, spec.mixer)
            others = map(chr, itertools.count(0xC0))  # À and so on: there are always enough
            candidates = itertools.chain(preferred, string.ascii_letters, others)
            letters[spec] = next(c for c in candidates if c.isalpha() and c not in letters.values())
    return letters


def runs_of_equal_loops(layout: Layout, random_loops: Collection[int]) -> list[list[int]]:
    """Random loops stand alone: they may be equal in this draw, and are not in the next."""

    def what(loop: int) -> Loop | int:
        return loop if loop in random_loops else layout[loop]

    return [list(run) for _, run in itertools.groupby(range(len(layout)), what)]


def label(run: list[int], random_loops: Collection[int]) -> str:
    name = f"loop {run[0]}" if len(run) == 1 else f"loops {run[0]}-{run[-1]}"
    return name + "*" * (run[0] in random_loops)


def bands(rows: list[tuple[str, str]]) -> list[str]:
    """The rows under a header of layer numbers, in as many bands as WIDTH makes necessary."""
    n_layers = len(rows[0][1])
    group = 5 if n_layers <= 50 else 10
    margin = max(len(name) for name, _ in rows) + 2
    per_band = (WIDTH - margin + 1) // (group + 1) * group
    lines = []
    for first in range(0, n_layers, per_band):
        starts = range(first, min(first + per_band, n_layers), group)
        header = " ".join(str(start).ljust(group) for start in starts)
        lines.append((" " * margin + header).rstrip())
        for name, row in rows:
            groups = " ".join(row[start : start + group] for start in starts)
            lines.append(name.ljust(margin) + groups)
    return lines


def legend(layout: Layout, letters: dict[LayerSpec, str]) -> list[str]:
    """Letter, name and number of (loop, layer) of every spec, wrapped at WIDTH."""
    counts = Counter(itertools.chain(*layout))
    lines = [""]
    for spec, letter in letters.items():
        entry = f"{letter} {spec} ({counts[spec]})"
        if lines[-1] and len(lines[-1]) + 2 + len(entry) > WIDTH:
            lines.append("")
        lines[-1] += "  " * bool(lines[-1]) + entry
    return lines
