"""The printed layout: what a person sees of the depth, the loops and the windows."""

from __future__ import annotations

import pytest

from apps.LT2.pattern import WIDTH, LayoutPlan, PatternParser, format_layout


def plan(pattern: str, **changes) -> LayoutPlan:
    options = {"n_layers": 20, "loop_count": 4, "mixer": "gdn", "hybrid_mixer": "full"}
    options |= {
        "default_sliding_window": 256,
        "known_mixers": ("full", "window", "gdn", "dsa", "a"),
    }
    return PatternParser(**{**options, **changes}).parse(pattern)


def table(pattern: str, **changes) -> list[str]:
    drawn = plan(pattern, **changes)
    return format_layout(drawn.draw(None), drawn.random_loops).splitlines()


def test_equal_loops_share_a_line():
    assert table("4:1") == [
        "           0     5     10    15",
        "loops 0-3  ggggF ggggF ggggF ggggF",
        "g gdn (64)  F full (16)",
    ]


def test_only_neighbours_are_folded():
    lines = table("full->gdn->gdn->full", n_layers=2)
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["loop", "0", "FF"],
        ["loops", "1-2", "gg"],
        ["loop", "3", "FF"],
    ]


def test_windows_of_different_width_have_different_letters():
    assert table("128->256->512->full", n_layers=7) == [
        "        0     5",
        "loop 0  wwwww ww",
        "loop 1  xxxxx xx",
        "loop 2  yyyyy yy",
        "loop 3  FFFFF FF",
        "w window=128 (7)  x window=256 (7)  y window=512 (7)  F full (7)",
    ]


def test_letters_are_unique_where_names_collide():
    (row,) = table("dsa,a,gdn,8,9,10,11,12", n_layers=8, loop_count=1)[1:2]
    letters = row.removeprefix("loop 0").replace(" ", "")
    assert len(set(letters)) == len(letters) == 8
    assert letters.startswith("dag")


def test_random_loops_are_marked():
    lines = table("4:1->random:4:1->4:1->4:1", mixer="window")
    assert [line.split("  ")[0] for line in lines[1:4]] == ["loop 0", "loop 1*", "loops 2-3"]
    assert lines[-1] == "* order drawn anew each training step; shown is that of evaluation"
    assert not any("*" in line for line in table("4:1"))


@pytest.mark.parametrize("n_layers", [1, 5, 25, 50, 51, 80, 97, 200])
@pytest.mark.parametrize("loop_count", [1, 4, 12])
def test_every_layer_is_shown_within_the_width(n_layers, loop_count):
    widths = "->".join(str(w) for w in range(100, 100 + loop_count))
    lines = table(widths, n_layers=n_layers, loop_count=loop_count)
    assert max(map(len, lines)) <= WIDTH
    rows = [line.split()[2:] for line in lines if line.startswith("loop")]
    assert sum(len(group) for row in rows for group in row) == n_layers * loop_count
    assert all(f"window={w} ({n_layers})" in " ".join(lines) for w in range(100, 100 + loop_count))


def test_headers_name_the_layer_below():
    for n_layers, group in ((20, 5), (97, 10)):
        lines = table("4:1", n_layers=n_layers)
        for header, row in zip(lines[:-1:2], lines[1:-1:2], strict=True):
            for start in header.split():
                layer, column = int(start), header.index(start)
                assert layer % group == 0
                assert row[column] == ("F" if layer % 5 == 4 else "g")
                assert row[column - 1] == " "
    assert "80" in table("4:1", n_layers=97)[2]
