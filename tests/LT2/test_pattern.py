"""What an attention_pattern means, and what a wrong one is told."""

from __future__ import annotations

import dataclasses

import pytest

from apps.LT2.pattern import LayerSpec, PatternParser, format_layout
from lingua.args import UserError

PARSER = PatternParser(
    n_layers=6,
    loop_count=1,
    mixer="gdn",
    hybrid_mixer="full",
    default_sliding_window=2048,
    known_mixers=("full", "window", "gdn"),
)


def parse(pattern, **changes):
    return dataclasses.replace(PARSER, **changes).parse(pattern)


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


def test_ratio_over_twenty_layers_puts_the_hybrid_mixer_where_the_paper_does():
    (loop,) = parse("4:1", n_layers=20)
    assert [i for i, spec in enumerate(loop) if spec.mixer == "full"] == [4, 9, 14, 19]
    assert {spec.mixer for i, spec in enumerate(loop) if i not in (4, 9, 14, 19)} == {"gdn"}


def test_one_segment_serves_every_loop():
    assert shown("2:1", loop_count=3) == ["gdn gdn full gdn gdn full"] * 3
    assert shown(None, loop_count=2) == ["gdn gdn gdn gdn gdn gdn"] * 2


def test_segments_go_to_their_loops_in_order():
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


def test_hybrid_family_may_be_windowed():
    assert shown("2:1", n_layers=3, hybrid_mixer="window", default_sliding_window=5) == [
        "gdn gdn window=5"
    ]


def test_only_windows_have_a_width():
    assert parse("full,window,7", n_layers=3)[0] == (
        LayerSpec("full", None),
        LayerSpec("window", 2048),
        LayerSpec("window", 7),
    )


@pytest.mark.parametrize(
    "pattern, changes, told",
    [
        ("8->full", {"loop_count": 3}, ["'8->full'", "2 segments", "model.loop_count=3"]),
        ("8->full", {"loop_count": 1}, ["2 segments", "model.loop_count=1"]),
        ("gdn*4", {}, ["lists 4 layers", "model.n_layers=6"]),
        ("gdn,full,gdn,full,gdn,full,gdn", {}, ["lists 7 layers", "model.n_layers=6"]),
        ("gdn,rwkv", {}, ["item 2", "'rwkv'", "full, window, gdn"]),
        ("gdn->full,rwkv", {"loop_count": 2}, ["segment 2", "item 2", "'rwkv'"]),
        ("", {}, ["item 1", "''"]),
        ("full->", {"loop_count": 2}, ["segment 2", "item 1"]),
        ("gdn,,full", {}, ["item 2"]),
        ("0", {}, ["'0'", "least is 1"]),
        ("swa=0", {}, ["'swa=0'", "least is 1"]),
        ("-4", {}, ["'-4'"]),
        ("gdn*0", {}, ["'gdn*0'", "NAME*COUNT"]),
        ("gdn*x", {}, ["'x'", "NAME*COUNT"]),
        ("gdn*", {}, ["NAME*COUNT"]),
        ("0:0", {}, ["0:0", "model.n_layers=6"]),
        ("6:1", {}, ["6:1", "7", "model.n_layers=6"]),
        ("bookend:0", {}, ["bookend:0", "at least 1"]),
        ("bookend:3", {}, ["bookend:3", "model.n_layers=6"]),
        (None, {"mixer": "rwkv"}, ["model.mixer='rwkv'", "full, window, gdn"]),
        (None, {"hybrid_mixer": "rwkv"}, ["model.hybrid_mixer='rwkv'"]),
        (None, {"n_layers": 0}, ["model.n_layers=0"]),
        (None, {"loop_count": 0}, ["model.loop_count=0"]),
        (None, {"mixer": "window", "default_sliding_window": 0}, ["default_sliding_window=0"]),
    ],
)
def test_a_wrong_pattern_is_told_where_and_why(pattern, changes, told):
    with pytest.raises(UserError) as error:
        parse(pattern, **changes)
    message = str(error.value)
    assert all(part in message for part in told), message
    if pattern is not None:
        assert repr(pattern) in message
    assert "\n" not in message


def test_layout_is_shown_one_loop_a_line_with_runs_folded():
    layout = parse("8->2:1", loop_count=2)
    assert format_layout(layout) == "loop 0  window=8*6\nloop 1  gdn*2 full gdn*2 full"
