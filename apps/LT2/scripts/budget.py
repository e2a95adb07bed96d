"""What a training budget buys: a recipe and its matched partners over the number of loops.

Partners have the recipe's parameters, its training FLOPs per token, or its decode cache, within 3%.
They differ in loop_count and, where loops change the quantity, in one size. Tokens, steps, FLOPs
and memory follow from the model; time also needs an MFU, which is measured or given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from apps.LT2.flops import cache_bytes, count_parameters, step_traffic, train_flops_per_token
from apps.LT2.inference.load import cast_for_inference
from apps.LT2.matching import BY, QUANTITIES, match_model
from apps.LT2.memory import training_memory
from apps.LT2.scripts.figure import (
    MORE_COLOURS,
    Line,
    draw_lines,
    import_pyplot,
    plain_number,
    save_figure,
    set_plain_ticks,
)
from apps.LT2.training.args import TrainArgs
from apps.LT2.transformer import LoopedTransformer, build_on_meta
from lingua.distributed import fit_to_world
from lingua.errors import UserError

MFU = 0.467
MFU_SOURCE = "measured: 1B hybrid, T = 4, one H200, docs/benchmarks/train_h200_20261130.md"
MAX_HOURS = 1e6  # a century; beyond it an exponent is wrong
DECODE_BATCH = 8
LENGTHS = [2**n for n in range(10, 18)]  # of the decode roofline, 1k to 128k
SHOWN_LENGTHS = (4096, 65536)  # in the table
KINDS = {"parameters": "-", "flops": "--", "cache": ":"}
TITLES = {
    "parameters": "equal parameters",
    "flops": "equal training FLOPs per token",
    "cache": "equal cache per sequence",
}


def cache(model: LoopedTransformer, seqlen: int) -> int:
    return cache_bytes(model, seqlen, torch.bfloat16)


@dataclass(frozen=True)
class Budget:
    option: str  # flops | tokens | hours
    amount: float
    ngpu: int
    peak: float  # TFLOP/s of a GPU
    mfu: float

    def __str__(self) -> str:
        amount = f"{self.amount:g}" if self.amount >= 1e6 else plain_number(self.amount)
        return f"{self.option}={amount}"

    @property
    def speed(self) -> float:
        """FLOP/s of all GPUs."""
        return self.ngpu * self.peak * 1e12 * self.mfu

    def tokens(self, flops_per_token: float) -> float:
        """Return how many training tokens the budget buys."""
        flops = self.amount * 3600 * self.speed if self.option == "hours" else self.amount
        return self.amount if self.option == "tokens" else flops / flops_per_token


@dataclass(frozen=True)
class Purchase:
    """One model, and what the budget buys for it."""

    kind: str  # what equals the recipe: parameters | flops | cache
    loop_count: int
    changes: dict[str, Any]  # of `model:`, loop_count aside
    parameters: int
    flops_per_token: int
    cache: int  # bytes of a sequence of seq_len tokens in bf16
    tokens: float
    steps: int
    flops: float
    hours: float
    memory: int  # peak bytes on a GPU
    decode: dict[int, float]  # length -> tokens/s at most, of a batch


def buy(
    name: str, budget: Budget, args: TrainArgs, kind: str, changes: dict[str, Any], bandwidth: float
) -> Purchase:
    """Return what the budget buys. UserError for less than a step, or more than a century.

    name: the recipe's, for errors
    """
    model, seqlen = build_on_meta(args.model), args.data.seq_len
    world = fit_to_world(args.distributed, budget.ngpu)
    rows = args.data.batch_size * args.grad_acc_steps * world.dp_replicate * world.dp_shard
    cost = train_flops_per_token(model, seqlen)
    tokens = budget.tokens(cost)
    steps, hours = tokens / (rows * seqlen), tokens * cost / budget.speed / 3600
    if steps < 1:
        raise UserError(
            f"{name}: {budget} buys {steps:.3g} steps of {args.model.loop_count} loops; a step has "
            f"{rows * seqlen:,} tokens and {rows * seqlen * cost:.3g} FLOPs. Check the exponent, "
            "or set other loop_counts"
        )
    if hours > MAX_HOURS:
        raise UserError(
            f"{name}: {budget} takes {hours:.2g} hours with gpus={budget.ngpu}; check the "
            "exponent, or set gpus="
        )
    memory = training_memory(
        model,
        world,
        batch_size=args.data.batch_size,
        seqlen=seqlen,
        grad_acc_steps=args.grad_acc_steps,
        muon=args.optim.name == "muon",
    ).peak[args.distributed.activation_checkpointing]
    parameters, size = count_parameters(model).total, cache(model, seqlen)
    cast_for_inference(model, torch.bfloat16)
    decode = {}
    for length in LENGTHS:
        moved = step_traffic(model, DECODE_BATCH, length, torch.bfloat16).total
        decode[length] = DECODE_BATCH * bandwidth * 1e12 / moved
    return Purchase(
        *(kind, args.model.loop_count, changes, parameters, cost, size),
        *(tokens, int(steps), tokens * cost, hours, memory, decode),
    )


def partners(
    name: str,
    budget: Budget,
    args: TrainArgs,
    loop_counts: Sequence[int],
    by: str,
    bandwidth: float,
) -> tuple[list[Purchase], list[str]]:
    """Return the purchases of all partners, and notes on partners that no size can match."""
    seqlen, found, notes = args.data.seq_len, [], []
    quantities: dict[str, Callable[[LoopedTransformer, int], int]] = {**QUANTITIES, "cache": cache}
    recipe = build_on_meta(args.model)
    for kind in KINDS:
        target = quantities[kind](recipe, seqlen)
        for loop_count in loop_counts:
            model = replace(args.model, loop_count=loop_count)
            # The FFN has no cache.
            orders = [by, *(b for b in BY if b != by and not (kind == "cache" and b == "ffn"))]
            changes: dict[str, Any] | None = {} if loop_count == args.model.loop_count else None
            for order in orders if changes is None else ():
                try:
                    measure = quantities[kind]
                    changes = match_model(model, target, quantity=measure, by=order, seqlen=seqlen)
                    break
                except UserError:
                    continue
            if changes is None:
                notes.append(f"no model of {loop_count} loops has {TITLES[kind]} within 3%")
                continue
            own = replace(args, model=replace(model, **changes))
            found.append(buy(name, budget, own, kind, changes, bandwidth))
    return found, notes


# ---- output


def as_dict(budget: Budget, found: Sequence[Purchase], notes: Sequence[str]) -> dict[str, Any]:
    return {"budget": asdict(budget), "models": [asdict(p) for p in found], "notes": list(notes)}


def print_budget(
    name: str,
    budget: Budget,
    found: Sequence[Purchase],
    notes: Sequence[str],
    trained: int,
    bandwidth: float,
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100, highlight=False, markup=False)
    source = MFU_SOURCE if budget.mfu == MFU else "given"
    console.print(f"{name}: {budget} on {budget.ngpu} GPUs of {budget.peak:g} TFLOP/s")
    console.print(f"MFU {budget.mfu:.1%} ({source})")
    for kind, title in TITLES.items():
        table = Table(box=None, pad_edge=False, title=f"\n{title}", title_justify="left")
        for head in ("T", "change", "params", "FLOPs/token", "tokens", "steps", "hours", "memory"):
            table.add_column(head, justify="left" if head == "change" else "right")
        for length in SHOWN_LENGTHS:
            table.add_column(f"tok/s {length // 1024}k", justify="right")
        for p in found:
            if p.kind == kind:
                changes = " ".join(f"{option}={value}" for option, value in p.changes.items())
                table.add_row(
                    f"{p.loop_count}{'*' * (p.loop_count == trained)}",
                    changes or "-",
                    *map(short, (p.parameters, p.flops_per_token, p.tokens, p.steps)),
                    f"{p.hours:,.1f}" if p.hours >= 10 else f"{p.hours:.3g}",
                    f"{p.memory / 2**30:,.1f} GiB",
                    *(f"{p.decode[length]:,.0f}" for length in SHOWN_LENGTHS),
                )
        console.print(table)
    for note in notes:
        console.print(note)
    console.print("* the recipe. memory: peak of a GPU, about.")
    limit = f"upper limit of decode at this length, batch {DECODE_BATCH}"
    console.print(f"tok/s: {limit}, with bandwidth={bandwidth:g} TB/s; an H100 has 3.35")


def short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):,.3g}{unit}"
    return f"{number:,.0f}"


def draw(found: Sequence[Purchase], budget: Budget, name: str, out: Path) -> None:
    """Draw tokens, hours and memory against T, and the decode roofline against length."""
    pyplot = import_pyplot(needed_by="the picture")
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), dpi=150, layout="constrained")
    counts = sorted({p.loop_count for p in found})
    # Only the quantity that the budget doesn't fix differs between models.
    if budget.option == "tokens":
        first: Callable[[Purchase], float] = lambda p: p.hours  # noqa: E731
        label = "hours"
    else:
        first, label = lambda p: p.tokens, "tokens that the budget buys"
    panels = [(first, label), (lambda p: p.memory / 2**30, "peak memory of a GPU (GiB)")]
    for panel, (value, title) in zip(axes, panels, strict=False):
        lines = []
        for i, kind in enumerate(KINDS):
            own = [p for p in found if p.kind == kind]
            xs, ys = [float(p.loop_count) for p in own], [value(p) for p in own]
            lines.append(Line(xs, ys, TITLES[kind], MORE_COLOURS[i], KINDS[kind], "osD"[i]))
        draw_lines(panel, lines)
        panel.set_xlabel("loops")
        panel.set_ylabel(title)
        set_plain_ticks(panel.xaxis, [float(n) for n in counts])
        set_plain_ticks(panel.yaxis)
    axes[0].legend(frameon=False, fontsize=8)
    lines = [
        Line(
            [float(length) for length in p.decode],
            list(p.decode.values()),
            f"T = {p.loop_count}" if p.kind == "parameters" else None,
            MORE_COLOURS[3 + counts.index(p.loop_count)],
            KINDS[p.kind],
        )
        for p in found
    ]
    axes[2].set_xscale("log", base=2)
    axes[2].set_yscale("log")
    draw_lines(axes[2], lines)
    ticks = [float(n) for n in LENGTHS[::2]]
    set_plain_ticks(axes[2].xaxis, ticks)
    axes[2].set_xticks(ticks, [f"{n // 1024}k" for n in LENGTHS[::2]])
    set_plain_ticks(axes[2].yaxis)
    axes[2].set_xlabel("length")
    axes[2].set_ylabel(f"decode tokens/s at most, batch {DECODE_BATCH}")
    axes[2].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{name}: {budget} on {budget.ngpu} GPUs", fontsize=10, x=0.01, ha="left")
    save_figure(figure, out)
    pyplot.close(figure)
