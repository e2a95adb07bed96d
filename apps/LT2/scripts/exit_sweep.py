"""Sweep the threshold of an early exit on a checkpoint: held-out loss and decode speed.

    python -m apps.LT2.scripts.exit_sweep ckpt=runs/gated out=runs/exits.png
    python -m apps.LT2.scripts.exit_sweep runs/demo exits='[kl:0.01,kl:0.1]' batch_sizes=[1,8]

The loss is that of `eval exit=`. The speed is that of decode steps over held-out text, so all rules
see the same tokens. Fixed numbers of loops are listed beside the rules. Files: the picture `out`,
and the numbers in a .jsonl of the same name.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from apps.LT2.evaluation.evaluate import build_validator, loop_cost
from apps.LT2.evaluation.validation import ValidationArgs, Validator
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

GATE = [f"gate:{q}" for q in (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)]
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
    decode_tokens: int = 64  # timed steps of each repeat
    prompt_tokens: int = 32  # tokens before them
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
    tokens = held_out(validator, n_rows, args.prompt_tokens + WARMUP + args.decode_tokens)
    tokens = tokens.to(model.tok_embeddings.weight.device)
    rule, is_cuda = parse_exit(exit), tokens.is_cuda
    assert rule is not None
    cache = model.init_cache(n_rows, tokens.shape[1])
    step: Callable[[Tensor], Tensor] = partial(model.step, cache=cache)
    if not rule.is_fixed:
        step = ExitDecoder(model, cache, rule, graph=is_cuda).step
    elif is_cuda:
        step = DecodeGraph(model, cache).step
    seconds = []
    for _ in range(args.repeats):
        cache.reset()
        model.prefill(tokens[:, : args.prompt_tokens], cache, last_only=True)
        steps = tokens[:, args.prompt_tokens :].split(1, 1)
        for i, token in enumerate(steps):
            if i == WARMUP:
                wait(is_cuda)
                start = time.perf_counter()
            step(token)
        wait(is_cuda)
        seconds.append(time.perf_counter() - start)
    return n_rows * args.decode_tokens / statistics.median(seconds)


def wait(is_cuda: bool) -> None:
    if is_cuda:
        torch.cuda.synchronize()


def held_out(validator: Validator, n_rows: int, n_tokens: int) -> Tensor:
    """Return (n_rows, n_tokens) of different places of the held-out text."""
    rows = validator.rows
    assert rows is not None
    flat = torch.from_numpy(rows.views(0, len(rows), False)[..., 0]).flatten()
    flat = flat.repeat(-(-n_tokens // len(flat)))
    stride = max(1, (len(flat) - n_tokens) // n_rows)
    starts = [i * stride % (len(flat) - n_tokens + 1) for i in range(n_rows)]
    return torch.stack([flat[start : start + n_tokens] for start in starts])


# ---- output


def print_table(points: Sequence[Point], batch_sizes: Sequence[int]) -> None:
    loss = loss_of(points)
    speeds = [f"tokens/s/{n}" for n in batch_sizes]
    heads = [name.replace("tokens/s/", "tokens/s, batch ") for name in speeds]
    print("exit         loops   MFLOPs  " + f"{loss:>12}  " + "  ".join(heads))
    for p in points:
        cells = "  ".join(
            f"{p[name]:{len(head)}.1f}" for name, head in zip(speeds, heads, strict=True)
        )
        flops = p["flops_per_token"] / 1e6
        print(f"{p['exit']:12} {p['loops']:5.2f} {flops:8.1f}  {p[loss]:12.4f}  {cells}")


def draw(points: Sequence[Point], batch_sizes: Sequence[int], out: Path) -> None:
    """Draw loss and speed against the threshold, and loss against speed."""
    pyplot = import_pyplot(needed_by="the picture")
    fixed = [p for p in points if ":" not in p["exit"]]
    ruled = sorted((p for p in points if ":" in p["exit"]), key=threshold)
    thresholds, loss = list(map(threshold, ruled)), loss_of(points)
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(12, 3.8), dpi=150, layout="constrained"
    )
    losses = [p[loss] for p in ruled]
    draw_lines(left, [Line(thresholds, losses, "exit", COLOURS[0], marker="o")])
    for p in fixed:
        left.axhline(p[loss], color=GREY, linestyle=":", zorder=0)
        note(left, f"T = {p['exit']}", (0.01, p[loss]), xycoords=("axes fraction", "data"))
    for i, n in enumerate(batch_sizes):
        colour, speed = COLOURS[i % len(COLOURS)], f"tokens/s/{n}"
        speeds, all_fixed = [p[speed] for p in ruled], [p[speed] for p in fixed]
        label = f", batch {n}" if len(batch_sizes) > 1 else ""
        draw_lines(middle, [Line(thresholds, speeds, f"exit{label}", colour, marker="o")])
        for p in fixed:
            middle.axhline(p[speed], color=colour, linestyle=":", alpha=0.5, zorder=0)
            note(middle, f"T = {p['exit']}", (0.01, p[speed]), xycoords=("axes fraction", "data"))
        lines = [
            Line(speeds, losses, f"exit{label}", colour, marker="o"),
            Line(all_fixed, [p[loss] for p in fixed], f"fixed T{label}", colour, "--", "s", 1.0),
        ]
        draw_lines(right, lines)
        for p in fixed:
            note(right, f"T = {p['exit']}", (p[speed], p[loss]))
    kind = {"gate": "the exit gate", "kl": "KL (nats)"}[ruled[0]["exit"].partition(":")[0]]
    unit = "bits per byte" if loss == "loss/val_bpb" else "nats per target"
    left.set(xlabel=f"threshold of {kind}", ylabel=f"held-out loss ({unit})")
    middle.set(xlabel=f"threshold of {kind}", ylabel="decode tokens/s")
    right.set(xlabel="decode tokens/s", ylabel=f"held-out loss ({unit})")
    if kind.startswith("KL"):
        for axes in (left, middle):
            axes.set_xscale("log")
            set_plain_ticks(axes.xaxis)
    if len(batch_sizes) > 1:
        middle.set_yscale("log")
        right.set_xscale("log")
    set_plain_ticks(middle.yaxis)
    set_plain_ticks(right.xaxis)
    right.legend(frameon=False, fontsize=LABEL_SIZE)
    save_figure(figure, out)
    pyplot.close(figure)


def note(axes: Any, text: str, place: tuple[float, float], **options: Any) -> None:
    style = {"fontsize": LABEL_SIZE, "color": COLOURS[5], "textcoords": "offset points"}
    axes.annotate(text, place, xytext=(2, 2), **style, **options)


def threshold(point: Point) -> float:
    return float(point["exit"].partition(":")[2])


def loss_of(points: Sequence[Point]) -> str:
    """Return the loss to show: bits per byte, which a synthetic task doesn't have."""
    return "loss/val_bpb" if "loss/val_bpb" in points[0] else "loss/val"


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
    for rule in rules:
        check_exit(rule, model.args, model.n_loops)
    validator = build_validator(args.validation, loaded)
    fixed = [str(n) for n in range(1, model.n_loops + 1)]
    points = [measure(model, validator, exit, args) for exit in [*fixed, *rules]]
    print_table(points, args.batch_sizes)
    if args.out is not None:
        numbers = Path(args.out).with_suffix(".jsonl")
        numbers.write_text("".join(json.dumps(point) + "\n" for point in points))
        draw(points, args.batch_sizes, Path(args.out))
        print(f"figure: {args.out}, numbers: {numbers}")


if __name__ == "__main__":
    run_cli(main)
