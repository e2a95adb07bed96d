"""attention_pattern: what it means, the errors of a wrong one, random layouts and the table."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from apps.LT2.pattern import COLUMNS, LayerSpec, LayoutPlan, PatternParser, format_layout
from lingua.errors import UserError

PARSER = PatternParser(
    n_layers=6,
    loop_count=1,
    mixer="gdn",
    hybrid_mixer="full",
    default_sliding_window=2048,
    known_mixers=("full", "window", "gdn"),
)
SOFTMAX = {"mixer": "window", "hybrid_mixer": "full", "default_sliding_window": 8}


def plan(pattern, **changes) -> LayoutPlan:
    return dataclasses.replace(PARSER, **changes).parse(pattern)


def parse(pattern, **changes):
    """The layout of inference."""
    return plan(pattern, **changes).draw(None)


def shown(pattern, **changes):
    """Loops as text: `gdn gdn full`, a window as `window=8`."""
    return [" ".join(map(str, loop)) for loop in parse(pattern, **changes)]


@pytest.mark.parametrize(
    "pattern, layers",
    [
        (None, "gdn gdn gdn gdn gdn gdn"),
        ("full", "full full full full full full"),
        ("window", " ".join(["window=2048"] * 6)),
        ("128", " ".join(["window=128"] * 6)),
        ("swa=128", " ".join(["window=128"] * 6)),
        ("2:1", "gdn gdn full gdn gdn full"),
        ("4:1", "gdn gdn gdn gdn full gdn"),  # the last cycle may be cut
        ("1:2", "gdn full full gdn full full"),
        ("0:1", "full full full full full full"),
        ("6:0", "gdn gdn gdn gdn gdn gdn"),
        ("bookend:1", "full gdn gdn gdn gdn full"),
        ("bookend:2", "full full gdn gdn full full"),
        ("gdn,full", "gdn full gdn full gdn full"),
        ("gdn*2,full", "gdn gdn full gdn gdn full"),
        ("full,gdn*3,64,swa=32", "full gdn gdn gdn window=64 window=32"),
        ("8*2,full", "window=8 window=8 full window=8 window=8 full"),
        (" gdn * 2 , full ", "gdn gdn full gdn gdn full"),
    ],
)
def test_one_segment_lays_out_the_depth(pattern, layers):
    assert shown(pattern) == [layers]


def test_ratio_over_twenty_layers_is_the_papers():
    (loop,) = parse("4:1", n_layers=20)
    assert [i for i, spec in enumerate(loop) if spec.mixer == "full"] == [4, 9, 14, 19]
    assert {spec.mixer for i, spec in enumerate(loop) if i not in (4, 9, 14, 19)} == {"gdn"}


def test_one_segment_serves_every_loop():
    assert shown("2:1", loop_count=3) == ["gdn gdn full gdn gdn full"] * 3
    assert shown(None, loop_count=2) == ["gdn gdn gdn gdn gdn gdn"] * 2


def test_segments_apply_to_loops_in_order():
    assert shown("128->256->512->full", loop_count=4, n_layers=2) == [
        "window=128 window=128",
        "window=256 window=256",
        "window=512 window=512",
        "full full",
    ]
    assert shown("gdn -> bookend:1 -> 2:1", loop_count=3, n_layers=3) == [
        "gdn gdn gdn",
        "full gdn full",
        "gdn gdn full",
    ]


def test_the_hybrid_mixer_may_be_a_window():
    assert shown("2:1", n_layers=3, hybrid_mixer="window", default_sliding_window=5) == [
        "gdn gdn window=5"
    ]


def test_only_window_layers_have_a_window():
    assert parse("full,window,7", n_layers=3)[0] == (
        LayerSpec("full", None),
        LayerSpec("window", 2048),
        LayerSpec("window", 7),
    )


@pytest.mark.parametrize(
    "pattern, changes, named",
    [
        ("8->full", {"loop_count": 3}, ["'8->full'", "2 segments", "model.loop_count=3"]),
        ("8->full", {"loop_count": 1}, ["2 segments", "model.loop_count=1"]),
        ("gdn*4", {}, ["4 layers", "model.n_layers=6"]),
        ("gdn,full,gdn,full,gdn,full,gdn", {}, ["7 layers", "model.n_layers=6"]),
        ("gdn,rwkv", {}, ["item 2", "'rwkv'", "full, window, gdn"]),
        ("gdn->full,rwkv", {"loop_count": 2}, ["segment 2", "item 2", "'rwkv'"]),
        ("", {}, ["item 1", "''"]),
        ("full->", {"loop_count": 2}, ["segment 2", "item 1"]),
        ("gdn,,full", {}, ["item 2"]),
        ("0", {}, ["'0'"]),
        ("swa=0", {}, ["'swa=0'"]),
        ("-4", {}, ["'-4'"]),
        ("gdn*0", {}, ["'gdn*0'", "NAME*COUNT"]),
        ("gdn*x", {}, ["'x'", "NAME*COUNT"]),
        ("gdn*", {}, ["NAME*COUNT"]),
        ("gdn*" + "9" * 50, {}, ["NAME*COUNT"]),
        ("0:0", {}, ["0:0", "model.n_layers=6"]),
        ("6:1", {}, ["6:1", "7", "model.n_layers=6"]),
        ("bookend:0", {}, ["bookend:0"]),
        ("bookend:3", {}, ["bookend:3", "model.n_layers=6"]),
        ("random:2", {}, ["'random:2'", "random:N:M"]),
        ("random:0:0", SOFTMAX, ["0:0", "model.n_layers=6"]),
        ("random:6:1", SOFTMAX, ["6:1", "model.n_layers=6"]),
        ("random:4:1", {}, ["model.mixer='gdn'", "4:1"]),
        (
            "full->random:4:1",
            {"mixer": "window", "hybrid_mixer": "gdn", "loop_count": 2},
            ["segment 2", "model.hybrid_mixer='gdn'"],
        ),
        ("random:4:1", {"mixer": "full"}, ["all 6 are full", "model.mixer"]),
        ("random:6:0", SOFTMAX, ["all 6 are window=8"]),
        (None, {"mixer": "rwkv"}, ["model.mixer='rwkv'", "full, window, gdn"]),
        (None, {"hybrid_mixer": "rwkv"}, ["model.hybrid_mixer='rwkv'"]),
        (None, {"n_layers": 0}, ["model.n_layers=0"]),
        (None, {"loop_count": 0}, ["model.loop_count=0"]),
        (None, {"mixer": "window", "default_sliding_window": 0}, ["default_sliding_window=0"]),
    ],
)
def test_an_error_names_the_place_and_the_options(pattern, changes, named):
    with pytest.raises(UserError) as error:
        parse(pattern, **changes)
    message = str(error.value)
    assert all(part in message for part in named), message
    if pattern is not None:
        assert repr(pattern) in message
    assert "\n" not in message


# ---- random layouts


def test_fixed_patterns_are_the_same_at_every_step():
    fixed = plan("8->2:1", loop_count=2)
    assert not fixed.random_loops
    assert fixed.draw(0) == fixed.draw(7) == fixed.draw(None)


def test_random_layouts_keep_the_counts_of_the_cycle():
    random_plan = plan("random:2:1", loop_count=3, seed=5, **SOFTMAX)
    assert random_plan.random_loops == {0, 1, 2}
    (cycle,) = parse("2:1", **SOFTMAX)
    for step in (None, 0, 1, 2):
        for loop in random_plan.draw(step):
            assert Counter(loop) == Counter(cycle)


def test_random_layouts_depend_on_seed_step_and_loop():
    options = {"loop_count": 2, "n_layers": 20, **SOFTMAX}
    layouts = [
        plan("random:4:1", seed=seed, **options).draw(step)
        for seed in (0, 1)
        for step in (None, 0, 1, 2)
    ]
    loops = [loop for layout in layouts for loop in layout]
    assert len(set(loops)) == len(loops) == 16
    again = [plan("random:4:1", seed=0, **options).draw(step) for step in (None, 0, 1, 2)]
    assert again == layouts[:4]


def test_random_layouts_are_the_same_on_every_machine_and_version():
    """A run must resume with the same layouts after an upgrade."""
    letters = [
        "".join("F" if spec.mixer == "full" else "w" for spec in loop)
        for step in (None, 0, 1000)
        for loop in plan("random:2:1", loop_count=2, seed=777, **SOFTMAX).draw(step)
    ]
    assert letters == ["wwwFFw", "wFwwFw", "FwwFww", "wwwwFF", "FFwwww", "FFwwww"]


def test_every_layer_runs_every_mixer_equally_often():
    random_plan = plan("random:2:1", seed=3, **SOFTMAX)
    counts = Counter(
        i
        for step in range(600)
        for i, spec in enumerate(random_plan.draw(step)[0])
        if spec.mixer == "full"
    )
    # 600 draws of 2 in 6: 200 each, standard deviation 11.5; beyond 5 of them one in a million
    assert all(abs(counts[i] - 200) < 58 for i in range(6))


def test_a_random_segment_does_not_change_other_loops():
    mixed = plan("bookend:1->random:2:1->gdn", loop_count=3, **SOFTMAX)
    assert mixed.random_loops == {1}
    drawn = [mixed.draw(step) for step in (None, *range(6))]
    assert {layout[0] for layout in drawn} == {parse("bookend:1", **SOFTMAX)[0]}
    assert {layout[2] for layout in drawn} == {parse("gdn")[0]}
    assert len({layout[1] for layout in drawn}) > 1


# ---- the table


def long_plan(pattern: str, **changes) -> LayoutPlan:
    options = {"n_layers": 20, "loop_count": 4, "mixer": "gdn", "hybrid_mixer": "full"}
    options |= {
        "default_sliding_window": 256,
        "known_mixers": ("full", "window", "gdn", "dsa", "a"),
    }
    return PatternParser(**{**options, **changes}).parse(pattern)


def table(pattern: str, **changes) -> list[str]:
    drawn = long_plan(pattern, **changes)
    return format_layout(drawn.draw(None), drawn.random_loops).splitlines()


def test_equal_loops_share_a_line():
    assert table("4:1") == [
        "           0     5     10    15",
        "loops 0-3  ggggF ggggF ggggF ggggF",
        "g gdn (64)  F full (16)",
    ]


def test_only_consecutive_loops_share_a_line():
    lines = table("full->gdn->gdn->full", n_layers=2)
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["loop", "0", "FF"],
        ["loops", "1-2", "gg"],
        ["loop", "3", "FF"],
    ]


def test_windows_of_different_size_have_different_letters():
    assert table("128->256->512->full", n_layers=7) == [
        "        0     5",
        "loop 0  wwwww ww",
        "loop 1  xxxxx xx",
        "loop 2  yyyyy yy",
        "loop 3  FFFFF FF",
        "w window=128 (7)  x window=256 (7)  y window=512 (7)  F full (7)",
    ]


def test_letters_are_unique_if_names_collide():
    (row,) = table("dsa,a,gdn,8,9,10,11,12", n_layers=8, loop_count=1)[1:2]
    letters = row.removeprefix("loop 0").replace(" ", "")
    assert len(set(letters)) == len(letters) == 8
    assert letters.startswith("dag")


def test_random_loops_are_marked():
    lines = table("4:1->random:4:1->4:1->4:1", mixer="window")
    assert [line.split("  ")[0] for line in lines[1:4]] == ["loop 0", "loop 1*", "loops 2-3"]
    assert lines[-1] == "* order drawn for each training step; the table shows that of evaluation"
    assert not any("*" in line for line in table("4:1"))


@pytest.mark.parametrize("n_layers", [1, 5, 25, 50, 51, 80, 97, 200])
@pytest.mark.parametrize("loop_count", [1, 4, 12])
def test_every_layer_is_shown_within_the_width(n_layers, loop_count):
    sizes = "->".join(str(w) for w in range(100, 100 + loop_count))
    lines = table(sizes, n_layers=n_layers, loop_count=loop_count)
    assert max(map(len, lines)) <= COLUMNS
    rows = [line.split()[2:] for line in lines if line.startswith("loop")]
    assert sum(len(group) for row in rows for group in row) == n_layers * loop_count
    assert all(f"window={w} ({n_layers})" in " ".join(lines) for w in range(100, 100 + loop_count))


def test_headers_number_the_layers_below():
    for n_layers, group in ((20, 5), (97, 10)):
        lines = table("4:1", n_layers=n_layers)
        for header, row in zip(lines[:-1:2], lines[1:-1:2], strict=True):
            for start in header.split():
                layer, column = int(start), header.index(start)
                assert layer % group == 0
                assert row[column] == ("F" if layer % 5 == 4 else "g")
                assert row[column - 1] == " "
    assert "60" in table("4:1", n_layers=97)[2]
