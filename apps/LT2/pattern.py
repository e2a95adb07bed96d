"""attention_pattern: which mixer, with which window, runs at every (loop, layer).

    pattern  := segment | segment ("->" segment){T-1}     one segment for all loops, or one per loop
    segment  := N ":" M             N layers of `mixer`, then M of `hybrid_mixer`, cycled
              | "random:" N ":" M   the layers of N:M in an order drawn for each training step
              | "bookend:" K        K `hybrid_mixer` layers at each end, `mixer` between
              | item ("," item)*    a list, whose length is n_layers or divides it (cycled)
    item     := NAME | NAME "*" COUNT | SIZE | "swa=" SIZE      a number is a window of that size

`"4:1"` over 20 layers puts `hybrid_mixer` at 4, 9, 14 and 19; `"128->256->512->full"` widens a
sliding window from loop to loop.

A random segment permutes its layers separately in every loop, so each family keeps its share. The
draw depends on (seed, step, loop) alone: all ranks agree, and a resumed run draws the same layouts.
Evaluation and inference use one fixed order, drawn from (seed, loop). `mixer` and `hybrid_mixer`
must be full or window, which share their weights; of two families every layer would own both.
"""

from __future__ import annotations

import itertools
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from lingua.errors import UserError


@dataclass(frozen=True)
class LayerSpec:
    """What one layer runs in one loop; only `window` layers have a window."""

    mixer: str
    window: int | None = None

    def __str__(self) -> str:
        return self.mixer if self.window is None else f"{self.mixer}={self.window}"


Loop = tuple[LayerSpec, ...]
Layout = tuple[Loop, ...]  # layout[loop][layer]

# One module serves these, so a layer may change from one to the other at any time.
SOFTMAX_MIXERS = ("full", "window")


@dataclass(frozen=True)
class LayoutPlan:
    """A parsed pattern: the layouts of all training steps and of inference."""

    loops: Layout  # random loops in the order of their cycle
    random_loops: frozenset[int] = frozenset()
    seed: int = 0

    def draw(self, step: int | None) -> Layout:
        """Return the layout of the training step after `step` steps; None is inference."""
        return tuple(
            self._shuffle(loop, i, step) if i in self.random_loops else loop
            for i, loop in enumerate(self.loops)
        )

    def map(self, change: Callable[[LayerSpec], LayerSpec]) -> LayoutPlan:
        """Return the plan with `change` applied to every layer."""
        return replace(self, loops=tuple(tuple(map(change, loop)) for loop in self.loops))

    def _shuffle(self, loop: Loop, index: int, step: int | None) -> Loop:
        # Python guarantees random() after a seed across versions, but not shuffle().
        source = random.Random(f"layout, seed {self.seed}, step {step}, loop {index}")
        return tuple(sorted(loop, key=lambda _: source.random()))


@dataclass(frozen=True)
class PatternParser:
    """Parses patterns for a model, whose fields have the names of the options."""

    n_layers: int
    loop_count: int
    mixer: str
    hybrid_mixer: str
    default_sliding_window: int
    known_mixers: Collection[str]
    seed: int = 0

    def parse(self, pattern: str | None) -> LayoutPlan:
        """Return the plan of `pattern`; UserError with the place and the rule if it is wrong."""
        self._check_settings()
        if pattern is None:
            return LayoutPlan((self._repeat([self._spec(self.mixer)]),) * self.loop_count)
        segments = [segment.strip() for segment in str(pattern).split("->")]
        if len(segments) == 1:
            segments *= self.loop_count
        if len(segments) != self.loop_count:
            raise UserError(
                f"model.attention_pattern={pattern!r} has {len(segments)} segments for "
                f"model.loop_count={self.loop_count}; use one segment, or one per loop"
            )
        loops = tuple(
            self._segment(segment, f"model.attention_pattern={pattern!r}, segment {i + 1}")
            for i, segment in enumerate(segments)
        )
        random_loops = (i for i, segment in enumerate(segments) if segment.startswith("random"))
        return LayoutPlan(loops, frozenset(random_loops), self.seed)

    def _check_settings(self) -> None:
        for field in ("mixer", "hybrid_mixer"):
            if getattr(self, field) not in self.known_mixers:
                raise UserError(
                    f"model.{field}={getattr(self, field)!r} must be one of "
                    f"{', '.join(self.known_mixers)}"
                )
        for field in ("n_layers", "loop_count", "default_sliding_window"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field}={getattr(self, field)} must be at least 1")

    def _spec(self, name: str) -> LayerSpec:
        return LayerSpec(name, self.default_sliding_window if name == "window" else None)

    def _segment(self, text: str, where: str) -> Loop:
        number = r"(\d{1,9})"
        if ratio := re.fullmatch(rf"random\s*:\s*{number}\s*:\s*{number}", text):
            return self._random(int(ratio[1]), int(ratio[2]), where)
        if ratio := re.fullmatch(rf"{number}\s*:\s*{number}", text):
            return self._ratio(int(ratio[1]), int(ratio[2]), where)
        if bookend := re.fullmatch(rf"bookend\s*:\s*{number}", text):
            return self._bookend(int(bookend[1]), where)
        specs: list[LayerSpec] = []
        for position, item in enumerate(text.split(",")):
            specs += self._item(item.strip(), f"{where}, item {position + 1}")
        if self.n_layers % len(specs):
            raise UserError(
                f"{where}: the {len(specs)} layers of {text!r} must divide "
                f"model.n_layers={self.n_layers}; list {self.n_layers} layers or a divisor of it"
            )
        return self._repeat(specs)

    def _repeat(self, specs: list[LayerSpec]) -> Loop:
        return tuple(specs[i % len(specs)] for i in range(self.n_layers))

    def _ratio(self, n_first: int, n_second: int, where: str) -> Loop:
        cycle = n_first + n_second
        if cycle == 0 or cycle > self.n_layers:
            raise UserError(
                f"{where}: {n_first}:{n_second} has {cycle} layers and must have 1 to "
                f"model.n_layers={self.n_layers}"
            )
        first, second = self._spec(self.mixer), self._spec(self.hybrid_mixer)
        return self._repeat([first] * n_first + [second] * n_second)

    def _random(self, n_first: int, n_second: int, where: str) -> Loop:
        for field in ("mixer", "hybrid_mixer"):
            if getattr(self, field) not in SOFTMAX_MIXERS:
                raise UserError(
                    f"{where}: model.{field}={getattr(self, field)!r} must be full or window for a "
                    f"random order, as the two mixers share weights; or use {n_first}:{n_second}"
                )
        loop = self._ratio(n_first, n_second, where)
        if len(set(loop)) == 1:
            raise UserError(
                f"{where}: a random order needs two kinds of layers, and all {self.n_layers} are "
                f"{loop[0]}; use model.mixer=window, model.hybrid_mixer=full, two counts above 0"
            )
        return loop

    def _bookend(self, n_ends: int, where: str) -> Loop:
        n_middle = self.n_layers - 2 * n_ends
        if n_ends < 1 or n_middle < 1:
            raise UserError(
                f"{where}: bookend:{n_ends} must be at least 1 and leave a layer between the ends "
                f"of model.n_layers={self.n_layers}"
            )
        end = [self._spec(self.hybrid_mixer)] * n_ends
        return tuple(end + [self._spec(self.mixer)] * n_middle + end)

    def _item(self, item: str, where: str) -> list[LayerSpec]:
        name, star, count = (part.strip() for part in item.partition("*"))
        if star and not re.fullmatch(r"0*[1-9]\d{0,3}", count):
            raise UserError(f"{where}: {item!r} repeats {count!r} times; write NAME*COUNT")
        if size := re.fullmatch(r"(?:swa\s*=\s*)?(\d{1,18})", name):
            if int(size[1]) < 1:
                raise UserError(f"{where}: the window {item!r} must be at least 1")
            spec = LayerSpec("window", int(size[1]))
        elif name in self.known_mixers:
            spec = self._spec(name)
        else:
            raise UserError(
                f"{where}: {item!r} must be a mixer ({', '.join(self.known_mixers)}) or a window "
                "size, maybe with *COUNT, in a list; or N:M, random:N:M or bookend:K; `->` "
                "separates the loops"
            )
        return [spec] * (int(count) if star else 1)


# ---- the table that a run logs

COLUMNS = 86  # with the margin of the summary of a run, 100
# Letters that stand out; other mixers take one of their name.
PREFERRED_LETTERS = {"full": "F", "window": "wxyz"}


def format_layout(layout: Layout, random_loops: Collection[int] = ()) -> str:
    """Return a table of the layout with a legend; equal consecutive loops share a line."""
    letters = choose_letters(layout)

    def key(loop: int) -> Loop | int:
        # Random loops stand alone: equal ones may differ in the next draw.
        return loop if loop in random_loops else layout[loop]

    rows = []
    for _, group in itertools.groupby(range(len(layout)), key):
        first, *others = group
        name = f"loops {first}-{others[-1]}" if others else f"loop {first}"
        letters_of_loop = "".join(letters[spec] for spec in layout[first])
        rows.append((name + "*" * (first in random_loops), letters_of_loop))
    lines = [*bands(rows), *legend(layout, letters)]
    if random_loops:
        lines.append("* order drawn for each training step; the table shows that of evaluation")
    return "\n".join(lines)


def choose_letters(layout: Layout) -> dict[LayerSpec, str]:
    """Give every spec a different letter, in the order in which they first appear."""
    letters: dict[LayerSpec, str] = {}
    for spec in itertools.chain(*layout):
        if spec not in letters:
            preferred = PREFERRED_LETTERS.get(spec.mixer, spec.mixer)
            others = map(chr, itertools.count(0xC0))  # À and so on, without end
            candidates = itertools.chain(preferred, string.ascii_letters, others)
            letters[spec] = next(c for c in candidates if c.isalpha() and c not in letters.values())
    return letters


def bands(rows: list[tuple[str, str]]) -> list[str]:
    """Return the rows under a header of layer numbers, in bands of at most COLUMNS columns."""
    n_layers = len(rows[0][1])
    group = 5 if n_layers <= 50 else 10
    margin = max(len(name) for name, _ in rows) + 2
    per_band = (COLUMNS - margin + 1) // (group + 1) * group
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
    """Return letter, name and number of (loop, layer) of every spec, wrapped at COLUMNS."""
    counts = Counter(itertools.chain(*layout))
    lines = [""]
    for spec, letter in letters.items():
        entry = f"{letter} {spec} ({counts[spec]})"
        if lines[-1] and len(lines[-1]) + 2 + len(entry) > COLUMNS:
            lines.append("")
        lines[-1] += "  " * bool(lines[-1]) + entry
    return lines
