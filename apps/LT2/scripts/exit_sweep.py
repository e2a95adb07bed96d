"""Sweep the threshold of an early exit on a checkpoint: held-out loss and decode speed.

    python -m apps.LT2.scripts.exit_sweep ckpt=runs/gated out=runs/exits.png
    python -m apps.LT2.scripts.exit_sweep runs/demo exits='[kl:0.01,kl:0.1]' batch_sizes=[1,8]

The loss is that of `eval exit=`. The speed is that of decode steps over held-out text, so all rules
see the same tokens. A run on a synthetic task decodes whole held-out examples, and has an accuracy
too. Fixed numbers of loops are listed beside the rules. Files: the picture `out`, and the numbers
in a .jsonl of the same name.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from apps.LT2.benchmark.timing import synchronize
from apps.LT2.evaluation.evaluate import build_validator, loop_cost
from apps.LT2.evaluation.validation import TaskRows, ValidationArgs, ValidationRows, Validator
from apps.LT2.exits import check_exit, exit_loops, parse_exit
from apps.LT2.inference.cuda_graph import DecodeGraph
from apps.LT2.inference.early_exit import ExitDecoder
from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.scripts.figure import (
    COLOURS,
    FORMATS,
    GREY,
    LABEL_SIZE,
    Line,
    draw_lines,
    import_pyplot,
    save_figure,
    set_plain_ticks,
)
from apps.LT2.transformer import LoopedTransformer
from lingua.args import parse_args
from lingua.config.help import format_value
from lingua.errors import UserError, run_cli
from lingua.files.lock import make_writable

GATE = [f"gate:{q}" for q in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)]
KL = [f"kl:{q}" for q in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)]
WARMUP = 4  # steps that are not timed

Point = dict[str, Any]


@dataclass(kw_only=True)
class SweepArgs:
    POSITIONAL: ClassVar = "ckpt"
    ALIASES: ClassVar = {"ckpt_dir": "ckpt", "dump_dir": "ckpt"}

    ckpt: str  # a run's dump_dir (newest checkpoint), a step folder, or a weight file
    # rules of one kind, as in [gate:0.5, gate:0.8]; null = thresholds of the gate if the model has
    # one, else of kl
    exits: list[str] | None = None
    batch_sizes: list[int] = field(default_factory=lambda: [1])  # sequences that decode together
    decode_tokens: int = 64  # timed steps of each repeat; of a task, rounded up to whole examples
    prompt_tokens: int = 32  # tokens before them; a task has none
    repeats: int = 3  # the median counts
    validation: ValidationArgs = field(default_factory=ValidationArgs)  # the held-out text
    out: str | None = None  # picture: .png, .svg or .pdf
    dtype: str = "auto"  # bf16, fp16 or fp32; auto: bf16 on a GPU, fp32 on a CPU
    device: str = "auto"  # cpu, cuda or cuda:N; auto: cuda if available
    tokenizer_path: str | None = None  # path of the tokenizer file; null = as in training

    def __post_init__(self) -> None:
        kinds = {rule and rule.kind for rule in map(parse_exit, self.exits or ["kl:0.1"])}
        if len(kinds) != 1 or kinds <= {None, "loops"}:
            raise UserError(
                f"exits={format_value(self.exits)} must be thresholds of one kind, e.g. [gate:0.5, "
                "gate:0.8]; fixed numbers of loops are measured in any case"
            )
        for name in ("decode_tokens", "prompt_tokens", "repeats", "batch_sizes"):
            value = getattr(self, name)
            if not value or min(value if isinstance(value, list) else [value]) < 1:
                raise UserError(f"{name}={format_value(value)} must be at least 1")
        if self.out is not None and Path(self.out).suffix not in FORMATS:
            raise UserError(f"out={self.out} must end in {', '.join(FORMATS)}")


# ---- measure


def measure(model: LoopedTransformer, validator: Validator, exit: str, args: SweepArgs) -> Point:
    """Return the loss, the mean loops and FLOPs per token, and the decode speeds of one rule."""
    device, rule = model.tok_embeddings.weight.device, parse_exit(exit)
    assert rule is not None
    with exit_loops(model, rule):
        free = None if rule.is_fixed else rule
        scores = validator(model, device=device, rank=0, world_size=1, rule=free)
        point = {"exit": exit, **loop_cost(model, free, scores), **scores}
        for n_rows in args.batch_sizes:
            point[f"tokens/s/{n_rows}"] = decode_speed(model, validator, exit, n_rows, args)
    return point


@torch.no_grad()
def decode_speed(
    model: LoopedTransformer, validator: Validator, exit: str, n_rows: int, args: SweepArgs
) -> float:
    """Return tokens/s of steps over held-out text, the median of the repeats."""
    assert validator.rows is not None
    sequences, n_prompt, n_untimed = held_out(validator.rows, n_rows, args)
    device, rule = model.tok_embeddings.weight.device, parse_exit(exit)
    assert rule is not None
    cache, is_cuda = model.init_cache(n_rows, sequences[0].shape[1]), device.type == "cuda"
    step: Callable[[Tensor], Tensor] = partial(model.step, cache=cache)
    if not rule.is_fixed:
        step = ExitDecoder(model, cache, rule, graph=is_cuda).step
    elif is_cuda:
        step = DecodeGraph(model, cache).step

    def seconds_of(tokens: Tensor) -> float:
        cache.reset()
        tokens, start = tokens.to(device), 0.0
        if n_prompt:
            model.prefill(tokens[:, :n_prompt], cache, last_only=True)
        for i, token in enumerate(tokens[:, n_prompt:].split(1, 1)):
            if i == n_untimed:
                synchronize(device)
                start = time.perf_counter()
            step(token)
        synchronize(device)
        return time.perf_counter() - start

    seconds_of(sequences[0])
    totals = [sum(map(seconds_of, sequences)) for _ in range(args.repeats)]
    n_timed = sum(tokens.shape[1] - n_prompt - n_untimed for tokens in sequences)
    return n_rows * n_timed / statistics.median(totals)


def held_out(
    rows: ValidationRows | TaskRows, n_rows: int, args: SweepArgs
) -> tuple[list[Tensor], int, int]:
    """Return sequences (n_rows, n) to decode, their prompt's length, and steps that aren't timed.

    They are examples of a task, or different places of the held-out text.
    """
    flat = torch.from_numpy(rows.views(0, len(rows), False)[..., 0])
    if isinstance(rows, TaskRows):
        n_batches = math.ceil(args.decode_tokens / flat.shape[1])
        index = torch.arange(n_batches * n_rows) % len(flat)
        return list(flat[index].split(n_rows)), 0, 0
    n_tokens = args.prompt_tokens + WARMUP + args.decode_tokens
    flat = flat.flatten()
    flat = flat.repeat(-(-n_tokens // len(flat)))
    stride = max(1, (len(flat) - n_tokens) // n_rows)
    starts = [i * stride % (len(flat) - n_tokens + 1) for i in range(n_rows)]
    text = torch.stack([flat[start : start + n_tokens] for start in starts])
    return [text], args.prompt_tokens, WARMUP


# ---- output


def print_table(points: Sequence[Point], batch_sizes: Sequence[int]) -> None:
    columns = {name: name for name, _ in scores_of(points)}
    columns |= {f"tokens/s/{n}": f"tokens/s, batch {n}" for n in batch_sizes}
    heads = [f"{head:>12}" for head in columns.values()]
    print("  ".join(["exit         loops   MFLOPs", *heads]))
    for p in points:
        digits = [1 if name.startswith("tokens/s") else 4 for name in columns]
        cells = [
            f"{p[name]:{len(head)}.{n}f}"
            for name, head, n in zip(columns, heads, digits, strict=True)
        ]
        flops = p["flops_per_token"] / 1e6
        print("  ".join([f"{p['exit']:12} {p['loops']:5.2f} {flops:8.4g}", *cells]))


def draw(points: Sequence[Point], batch_sizes: Sequence[int], out: Path) -> None:
    """Draw scores and speed against the threshold, and the main score against speed."""
    pyplot = import_pyplot(needed_by="the picture")
    fixed = [p for p in points if ":" not in p["exit"]]
    ruled = sorted((p for p in points if ":" in p["exit"]), key=threshold)
    thresholds, scores = list(map(threshold, ruled)), scores_of(points)
    n_panels = len(scores) + 2
    figure, (*panels, middle, right) = pyplot.subplots(
        1, n_panels, figsize=(4 * n_panels, 3.8), dpi=150, layout="constrained"
    )
    for axes, (name, label) in zip(panels, scores, strict=True):
        values = [p[name] for p in ruled]
        draw_lines(axes, [Line(thresholds, values, "exit", COLOURS[0], marker="o")])
        draw_levels(axes, fixed, name, color=GREY)
        axes.set(ylabel=label)
    main, main_label = scores[-1]
    if len(batch_sizes) > 1:
        middle.set_yscale("log")
    for i, n in enumerate(batch_sizes):
        colour, speed = COLOURS[i % len(COLOURS)], f"tokens/s/{n}"
        speeds, all_fixed = [p[speed] for p in ruled], [p[speed] for p in fixed]
        label = f", batch {n}" if len(batch_sizes) > 1 else ""
        draw_lines(middle, [Line(thresholds, speeds, f"exit{label}", colour, marker="o")])
        draw_levels(middle, fixed, speed, color=colour, alpha=0.5)
        lines = [
            Line(speeds, [p[main] for p in ruled], f"exit{label}", colour, marker="o"),
            Line(all_fixed, [p[main] for p in fixed], f"fixed T{label}", colour, "--", "s", 1.0),
        ]
        draw_lines(right, lines)
        for p in fixed:
            note(right, f"T = {p['exit']}", (p[speed], p[main]))
    kind = {"gate": "the exit gate", "kl": "KL (nats)"}[ruled[0]["exit"].partition(":")[0]]
    middle.set(ylabel="decode tokens/s")
    right.set(xlabel="decode tokens/s", ylabel=main_label)
    for axes in (*panels, middle):
        axes.set(xlabel=f"threshold of {kind}")
        if kind.startswith("KL"):
            axes.set_xscale("log")
            decades = [10.0**k for k in range(-9, 0) if thresholds[0] <= 10.0**k <= thresholds[-1]]
            set_plain_ticks(axes.xaxis, decades if len(decades) > 1 else None)
    if len(batch_sizes) > 1:
        right.set_xscale("log")
    set_plain_ticks(middle.yaxis)
    set_plain_ticks(right.xaxis)
    right.legend(frameon=False, fontsize=LABEL_SIZE)
    save_figure(figure, out)
    pyplot.close(figure)


def draw_levels(axes: Any, fixed: Sequence[Point], name: str, **style: Any) -> None:
    """Draw a level for each fixed T. Of levels that are too close, the largest T is labelled."""
    for p in fixed:
        axes.axhline(p[name], linestyle=":", zorder=0, **style)
    heights: list[float] = []
    for p in reversed(fixed):
        height = axes.transData.transform((1.0, p[name]))[1] * 72 / axes.figure.dpi
        if all(abs(height - other) > LABEL_SIZE for other in heights):
            heights.append(height)
            note(axes, f"T = {p['exit']}", (0.01, p[name]), xycoords=("axes fraction", "data"))


def note(axes: Any, text: str, place: tuple[float, float], **options: Any) -> None:
    style = {"fontsize": LABEL_SIZE, "color": COLOURS[5], "textcoords": "offset points"}
    axes.annotate(text, place, xytext=(2, 2), **style, **options)


def threshold(point: Point) -> float:
    return float(point["exit"].partition(":")[2])


def scores_of(points: Sequence[Point]) -> list[tuple[str, str]]:
    """Return the scores to show, (name, label), the main one last.

    Text has bits per byte; a synthetic task has a loss and an accuracy.
    """
    if "acc/val" in points[0]:
        return [("loss/val", "held-out loss (nats per answer)"), ("acc/val", "held-out accuracy")]
    return [("loss/val_bpb", "held-out loss (bits per byte)")]


def main(argv: list[str]) -> None:
    args = parse_args(SweepArgs, argv, prog="python -m apps.LT2.scripts.exit_sweep", doc=__doc__)
    if args.out is not None:
        import_pyplot(needed_by="the picture")
        make_writable("out", Path(args.out).parent)
    loaded = load_model_and_tokenizer(
        args.ckpt,
        dtype=args.dtype,
        device=args.device,
        tokenizer_path=args.tokenizer_path,
        exit=args.exits[0] if args.exits else "none",
    )
    model = loaded.model
    rules = args.exits or (KL if model.exit_gate is None else GATE)
    for text in rules:
        rule = check_exit(text, model.args, model.n_loops)
        if rule is not None and not rule.may_fire(model.n_loops):
            raise UserError(
                f"exits={format_value(rules)}: no token leaves early in {model.n_loops} loops; "
                "gate needs a model of at least 2 loops, kl of 3"
            )
    validator = build_validator(args.validation, loaded)
    fixed = [str(n) for n in range(1, model.n_loops + 1)]
    points: list[Point] = []
    for exit in (exits := [*fixed, *rules]):
        print(f"exit={exit}, {len(points) + 1} of {len(exits)}", file=sys.stderr, flush=True)
        points.append(measure(model, validator, exit, args))
    print_table(points, args.batch_sizes)
    if args.out is not None:
        numbers = Path(args.out).with_suffix(".jsonl")
        numbers.write_text("".join(json.dumps(point) + "\n" for point in points))
        draw(points, args.batch_sizes, Path(args.out))
        print(f"figure: {args.out}, numbers: {numbers}")


if __name__ == "__main__":
    run_cli(main)
