"""attention_pattern: which mixer, with which window, at every (loop, layer).

    pattern  := segment | segment ("->" segment){T-1}      one segment for all loops, or one a loop
    segment  := N ":" M             N layers of `mixer`, then M of `hybrid_mixer`, cycled
              | "random:" N ":" M   the layers of N:M in an order drawn anew each training step
              | "bookend:" K        K `hybrid_mixer` layers at each end, `mixer` between
              | item ("," item)*    written out; its length is n_layers or divides it (cycled)
    item     := NAME | NAME "*" COUNT | WIDTH | "swa=" WIDTH      a number is a window of that width

`"4:1"` over 20 layers puts `hybrid_mixer` at 4, 9, 14 and 19; `"128->256->512->full"` widens a
sliding window from loop to loop.

What random draws: every loop with a random segment gets its own permutation of that segment's
layers, so that each family keeps its share. It depends on (seed, step, loop) and nothing else: all
ranks agree, and a resumed run goes on as it would have. Evaluation and inference have one fixed
order, drawn from (seed, loop). `mixer` and `hybrid_mixer` must be full or window, which share their
weights; with two families every layer would have to own both.
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
    """What one layer does in one loop; `window` is set for `window` layers only."""

    mixer: str
    window: int | None = None

    def __str__(self) -> str:
        return self.mixer if self.window is None else f"{self.mixer}={self.window}"


Loop = tuple[LayerSpec, ...]
Layout = tuple[Loop, ...]  # layout[loop][layer]

# Beyond what anybody trains; a slip of the keyboard would take hours to build, and all memory.
MOST = {"n_layers": 2000, "loop_count": 10_000}

# One module serves these, so that a layer may change from one to the other at any time.
SOFTMAX_MIXERS = ("full", "window")


@dataclass(frozen=True)
class LayoutPlan:
    """A pattern that was read: the layout of each training step, and the one of inference."""

    loops: Layout  # random loops in the order of their cycle
    random_loops: frozenset[int] = frozenset()
    seed: int = 0

    def draw(self, step: int | None) -> Layout:
        """The layout of the training step after `step` steps; None is evaluation and inference."""
        return tuple(
            self._shuffle(loop, i, step) if i in self.random_loops else loop
            for i, loop in enumerate(self.loops)
        )

    def map(self, change: Callable[[LayerSpec], LayerSpec]) -> LayoutPlan:
        """The same plan with every layer changed."""
        return replace(self, loops=tuple(tuple(map(change, loop)) for loop in self.loops))

    def _shuffle(self, loop: Loop, index: int, step: int | None) -> Loop:
        # Sorted by random() rather than shuffled: Python promises that random() after a seed stays
        # the same in all versions, and does not for shuffle().
        source = random.Random(f"layout, seed {self.seed}, step {step}, loop {index}")
        return tuple(sorted(loop, key=lambda _: source.random()))


@dataclass(frozen=True)
class PatternParser:
    """The setting in which a pattern is read: the model's fields, under their own names."""

    n_layers: int
    loop_count: int
    mixer: str
    hybrid_mixer: str
    default_sliding_window: int
    known_mixers: Collection[str]
    seed: int = 0

    def parse(self, pattern: str | None) -> LayoutPlan:
        """What `pattern` means; a wrong one is a UserError naming the place and the rule."""
        self._check_settings()
        if pattern is None:
            return LayoutPlan((self._repeat([self._spec(self.mixer)]),) * self.loop_count)
        segments = [segment.strip() for segment in str(pattern).split("->")]
        if len(segments) == 1:
            segments *= self.loop_count
        if len(segments) != self.loop_count:
            raise UserError(
                f"model.attention_pattern={pattern!r} has {len(segments)} segments for "
                f"model.loop_count={self.loop_count}; write one segment, or one for each loop"
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
                    f"model.{field}={getattr(self, field)!r} is no mixer; "
                    f"choose one of {', '.join(self.known_mixers)}"
                )
        for field in ("n_layers", "loop_count", "default_sliding_window"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field}={getattr(self, field)} must be at least 1")
        for field, most in MOST.items():
            if getattr(self, field) > most:
                raise UserError(f"model.{field}={getattr(self, field)} must be at most {most}")

    def _spec(self, name: str) -> LayerSpec:
        return LayerSpec(name, self.default_sliding_window if name == "window" else None)

    def _segment(self, text: str, where: str) -> Loop:
        if ratio := re.fullmatch(r"random\s*:\s*(\d+)\s*:\s*(\d+)", text):
            return self._random(_number(ratio[1]), _number(ratio[2]), where)
        if ratio := re.fullmatch(r"(\d+)\s*:\s*(\d+)", text):
            return self._ratio(_number(ratio[1]), _number(ratio[2]), where)
        if bookend := re.fullmatch(r"bookend\s*:\s*(\d+)", text):
            return self._bookend(_number(bookend[1]), where)
        specs: list[LayerSpec] = []
        for position, item in enumerate(text.split(",")):
            specs += self._item(item.strip(), f"{where}, item {position + 1}")
        if not specs or self.n_layers % len(specs):
            raise UserError(
                f"{where}: {text!r} lists {len(specs)} layers, and that does not divide "
                f"model.n_layers={self.n_layers}; list {self.n_layers} layers or a divisor of it"
            )
        return self._repeat(specs)

    def _repeat(self, specs: list[LayerSpec]) -> Loop:
        return tuple(specs[i % len(specs)] for i in range(self.n_layers))

    def _ratio(self, n_first: int, n_second: int, where: str) -> Loop:
        cycle = n_first + n_second
        if cycle == 0 or cycle > self.n_layers:
            raise UserError(
                f"{where}: a cycle of {n_first}:{n_second} needs 1 to model.n_layers="
                f"{self.n_layers} layers and has {cycle}"
            )
        first, second = self._spec(self.mixer), self._spec(self.hybrid_mixer)
        return self._repeat([first] * n_first + [second] * n_second)

    def _random(self, n_first: int, n_second: int, where: str) -> Loop:
        names = {"mixer": self.mixer, "hybrid_mixer": self.hybrid_mixer}
        for field, name in names.items():
            if name not in SOFTMAX_MIXERS:
                raise UserError(
                    f"{where}: a random order needs weights that serve both mixers, and "
                    f"model.{field}={name!r} has its own; set model.mixer and model.hybrid_mixer "
                    f"to full and window, or fix the order, e.g. {n_first}:{n_second}"
                )
        loop = self._ratio(n_first, n_second, where)
        if len(set(loop)) == 1:
            raise UserError(
                f"{where}: all {self.n_layers} layers are {loop[0]}, so that there is nothing to "
                "draw; set model.mixer=window, model.hybrid_mixer=full and both counts above 0"
            )
        return loop

    def _bookend(self, n_ends: int, where: str) -> Loop:
        n_middle = self.n_layers - 2 * n_ends
        if n_ends < 1 or n_middle < 1:
            raise UserError(
                f"{where}: bookend:{n_ends} takes {n_ends} layers at each end of "
                f"model.n_layers={self.n_layers}; K must be at least 1 and leave a layer between"
            )
        end = [self._spec(self.hybrid_mixer)] * n_ends
        return tuple(end + [self._spec(self.mixer)] * n_middle + end)

    def _item(self, item: str, where: str) -> list[LayerSpec]:
        name, star, count = (part.strip() for part in item.partition("*"))
        if star and not re.fullmatch(r"0*[1-9]\d{0,8}", count):
            raise UserError(f"{where}: {item!r} repeats {count!r} times; write NAME*COUNT")
        if width := re.fullmatch(r"(?:swa\s*=\s*)?(\d+)", name):
            if _number(width[1]) < 1:
                raise UserError(f"{where}: {item!r} is a window of no keys; the least is 1")
            spec = LayerSpec("window", _number(width[1]))
        elif name in self.known_mixers:
            spec = self._spec(name)
        else:
            raise UserError(
                f"{where}: {item!r} is neither N:M, random:N:M, bookend:K, a window width nor a "
                f"mixer ({', '.join(self.known_mixers)})"
            )
        # more than n_layers of them fit no model; a list of so many might fit no memory
        return [spec] * (min(int(count), self.n_layers + 1) if star else 1)


def _number(digits: str) -> int:
    """At most 10**18, which 64 bits hold and no model has: Python reads no 5,000 digits."""
    return int(digits) if len(digits.lstrip("0")) <= 18 else 10**18


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
