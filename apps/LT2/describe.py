"""Describe models before training them: layout, parameters, FLOPs, caches and memory.

    python -m apps.LT2.describe config=apps/LT2/configs/600M/looped_hybrid_gdn_4to1_600M.yaml
    python -m apps.LT2.describe A.yaml B.yaml model.loop_count=2          # config= is optional
    python -m apps.LT2.describe config=A.yaml config=B.yaml match=parameters by=n_layers
    python -m apps.LT2.describe A.yaml flops=1e19 gpus=8 out=budget.png   # what a budget buys

Other options such as model.loop_count=2 apply to all configs. Nothing is allocated: models are
built on the meta device, in seconds on any machine. Parameters count once, however often they loop;
FLOPs, caches and activations count in every loop. If T varies in training, FLOPs are the mean over
all steps, and memory is the largest T's. Activations (`kept` in JSON) and peak memory are
estimates for compiled blocks on a GPU; everything else is exact.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from apps.LT2.flops import (
    cache_bytes,
    count_parameters,
    prefill_flops,
    step_traffic,
    train_flops_per_token,
)
from apps.LT2.inference.load import cast_for_inference
from apps.LT2.loop_loss import check_exits
from apps.LT2.matching import BY, QUANTITIES, match_model
from apps.LT2.memory import training_memory
from apps.LT2.parallel import check_tensor_parallel
from apps.LT2.pattern import format_layout
from apps.LT2.scripts.budget import MFU, Budget, as_dict, draw, partners, print_budget
from apps.LT2.scripts.figure import FORMATS as FIGURES
from apps.LT2.scripts.figure import import_pyplot
from apps.LT2.training.args import TrainArgs
from apps.LT2.training.unused_options import unused_options
from apps.LT2.transformer import LoopedTransformer, build_on_meta
from lingua.args import parse_args, print_text
from lingua.config.cli import config_names, split_paths
from lingua.config.help import format_value
from lingua.dataloader.synthetic.args import build_task
from lingua.distributed import fit_to_world
from lingua.errors import UserError, run_cli
from lingua.files.lock import make_writable
from lingua.parallel.args import ACTIVATION_CHECKPOINTING
from lingua.tokenizer import build_tokenizer, find_tokenizer_file

logger = logging.getLogger(__name__)

LLAMA3_VOCAB = 128_256  # vocabulary of the recipes' tokenizer
DECODE_BATCHES = (1, 8)
FORMATS = ("table", "json")
DEFAULT_LOOPS = (1, 2, 4, 8)
EXAMPLES = {"flops": "1e19", "tokens": "10e9", "hours": "24"}
GIB, MIB = 2**30, 2**20


@dataclass
class DescribeArgs:
    ALIASES: ClassVar = {"gpus": "ngpu"}

    config: list[str] = field(default_factory=list)  # recipes, side by side
    match: str | None = None  # parameters | flops: make the other configs equal to the first
    by: str = "n_layers"  # what match changes: n_layers | dim | ffn
    ngpu: int = 1  # GPUs that train, for the memory of each
    bandwidth: float = 3.35  # TB/s of the GPU's memory, for the decode roofline; H100 SXM
    format: str = "table"  # table | json
    # a training budget: what it buys, for each config and its matched partners over loop_counts
    flops: float | None = None  # total training FLOPs, e.g. 1e19
    tokens: float | None = None  # training tokens
    hours: float | None = None  # of all GPUs
    loop_counts: list[int] | None = None  # T of the partners; null = 1, 2, 4, 8 and the config's
    mfu: float = MFU  # share of `peak` in training; the default is measured, docs/benchmarks
    peak: float = 989.0  # dense bf16 TFLOP/s of a GPU; H100 and H200 SXM
    out: str | None = None  # picture of a budget: .png, .svg or .pdf

    def __post_init__(self) -> None:
        if not self.config:
            raise UserError("config is empty; name a recipe, e.g. config=apps/LT2/configs/...yaml")
        for name, choices in (("match", QUANTITIES), ("by", BY), ("format", FORMATS)):
            value = getattr(self, name)
            if value not in (None, *choices):
                raise UserError(f"{name}={value} must be one of {', '.join(choices)}")
        if self.match and len(self.config) < 2:
            raise UserError(f"match={self.match} compares configs; name a second config=")
        if self.by != "n_layers" and not self.match and self.budget() is None:
            raise UserError(f"by={self.by} needs match=parameters or match=flops, or a budget")
        if self.ngpu < 1:
            raise UserError(f"ngpu={self.ngpu} must be at least 1")
        if self.bandwidth <= 0:
            raise UserError(f"bandwidth={self.bandwidth} must be above 0 TB/s")
        self._check_budget()

    def _check_budget(self) -> None:
        budgets = {name: getattr(self, name) for name in ("flops", "tokens", "hours")}
        given = [name for name, value in budgets.items() if value is not None]
        for name in given:
            if not 0 < budgets[name] < math.inf:
                raise UserError(f"{name}={budgets[name]:g} must be above 0, e.g. {EXAMPLES[name]}")
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are each a budget; set only one of them")
        if not 0 < self.mfu <= 1:
            raise UserError(f"mfu={self.mfu:g} must be above 0 and at most 1, e.g. 0.4")
        if not 0 < self.peak < math.inf:
            raise UserError(f"peak={self.peak:g} must be above 0 TFLOP/s")
        if self.loop_counts is not None and min(self.loop_counts, default=0) < 1:
            raise UserError(
                f"loop_counts={format_value(self.loop_counts)} must be numbers of loops from 1 on, "
                "e.g. [1, 2, 4], or null"
            )
        if self.out is not None and Path(self.out).suffix not in FIGURES:
            raise UserError(f"out={self.out} must end in {', '.join(FIGURES)}")
        for name in ("loop_counts", "mfu", "peak", "out"):
            if not given and getattr(self, name) != getattr(DescribeArgs, name):
                raise UserError(f"{name} needs a budget: flops=, tokens= or hours=")
        if given and self.match:
            raise UserError(f"match={self.match}: a budget compares matched models without it")
        if self.out is not None and len(self.config) > 1:
            raise UserError(f"out={self.out} shows one config; describe the others alone")

    def budget(self) -> Budget | None:
        for name in ("flops", "tokens", "hours"):
            if (amount := getattr(self, name)) is not None:
                return Budget(name, amount, self.ngpu, self.peak, self.mfu)
        return None


def parse(argv: Sequence[str]) -> tuple[DescribeArgs, list[str]]:
    """Separate the options of this command from overrides of the configs."""
    paths, options = split_paths(argv)
    configs = [*map(str, paths), *(o[7:] for o in options if o.startswith("config="))]
    options = [option for option in options if not option.startswith("config=")]
    sections = {f.name for f in fields(TrainArgs)}

    def is_override(option: str) -> bool:
        name = option.partition("=")[0]
        return "." in name or name in sections

    overrides = [option for option in options if is_override(option)]
    given = [option for option in options if not is_override(option)]
    listed = [f"config=[{','.join(configs)}]"] if configs else []
    prog = "python -m apps.LT2.describe"
    return parse_args(DescribeArgs, listed + given, prog=prog, doc=__doc__), overrides


def read_config(path: str, overrides: Sequence[str]) -> TrainArgs:
    """Read a config, with the size of its tokenizer, or Llama 3's if the tokenizer is missing."""
    args = parse_args(TrainArgs, [f"config={path}", *overrides])
    args.model.max_seqlen = args.data.seq_len
    if args.model.vocab_size == -1 and args.data.task is not None:
        args.model.vocab_size = build_task(args.data.task).n_tokens
    elif args.model.vocab_size == -1:
        tokenizer = args.data.tokenizer
        try:
            find_tokenizer_file(tokenizer.name, tokenizer.path)
        except UserError:
            args.model.vocab_size = LLAMA3_VOCAB
            logger.warning("%s: no tokenizer file; with Llama 3's vocabulary", path)
        else:
            args.model.vocab_size = build_tokenizer(tokenizer.name, tokenizer.path).n_words
    return args


def describe(args: TrainArgs, ngpu: int, bandwidth: float) -> dict[str, Any]:
    """Return sizes and costs of a model as plain values: counts, FLOPs, bytes, tokens/s."""
    check_exits(args.model.loop_loss, args.model.loop_count)
    model, seqlen = build_on_meta(args.model), args.data.seq_len
    count = count_parameters(model)
    described: dict[str, Any] = {
        "layout": format_layout(model.layout, model.layout_plan.random_loops).splitlines(),
        "n_layers": args.model.n_layers,
        "loop_count": args.model.loop_count,
        "parameters": {"total": count.total, "embedding": count.embedding, "body": count.body}
        | {"gates": count.gates},
        "seq_len": seqlen,
        "flops": {
            "training, per token": train_flops_per_token(model, seqlen),
            "prefill of seq_len tokens": prefill_flops(model, seqlen),
        },
        "memory": _memory(model, args, ngpu),
    }
    if model.loop_plan.varies:
        shares = model.loop_plan.shares()
        described["training loops"] = {str(T): share for T, share in shares.items()}
    cast_for_inference(model, torch.bfloat16)
    return described | {
        "cache": _caches(model, seqlen),
        "decode": _decode(model, seqlen, bandwidth),
    }


def _memory(model: LoopedTransformer, args: TrainArgs, ngpu: int) -> dict[str, Any]:
    """Return the bytes of a training step on each GPU."""
    check_tensor_parallel(model, args.distributed.tp_size)
    memory = training_memory(
        model,
        fit_to_world(args.distributed, ngpu),
        batch_size=args.data.batch_size,
        seqlen=args.data.seq_len,
        grad_acc_steps=args.grad_acc_steps,
        muon=args.optim.name == "muon",
    )
    mode = args.distributed.activation_checkpointing
    return {"ngpu": ngpu, "batch_size": args.data.batch_size, "mode": mode} | asdict(memory)


def _caches(model: LoopedTransformer, seqlen: int) -> dict[str, int]:
    """Return the bytes of a sequence's cache, and the part that grows with its length."""
    total, doubled = (cache_bytes(model, n, torch.bfloat16) for n in (seqlen, 2 * seqlen))
    return {"per sequence": total, "growing": doubled - total}


def _decode(model: LoopedTransformer, seqlen: int, bandwidth: float) -> dict[str, Any]:
    """Return the bytes of a step after seqlen tokens, and the tokens/s if it only moves them."""
    described = {}
    for batch_size in DECODE_BATCHES:
        moved = step_traffic(model, batch_size, seqlen, torch.bfloat16).total
        described[f"batch {batch_size}"] = {
            "bytes per step": moved,
            "tokens/s at most": batch_size * bandwidth * 1e12 / moved,
        }
    return described


# ---- output


def describe_all(given: DescribeArgs, overrides: Sequence[str]) -> dict[str, Any]:
    """Describe every config, and match all to the first if asked to."""
    args = [read_config(path, overrides) for path in given.config]
    first = build_on_meta(args[0].model)
    result: dict[str, Any] = {}
    for name, own in zip(config_names(given.config), args, strict=True):
        changes: dict[str, Any] = {}
        if given.match and own is not args[0]:
            seqlen = own.data.seq_len
            target = QUANTITIES[given.match](first, args[0].data.seq_len)
            try:
                changes = match_model(
                    own.model, target, quantity=given.match, by=given.by, seqlen=seqlen
                )
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            own.model = replace(own.model, **changes)
        result[name] = describe(own, given.ngpu, given.bandwidth) | {
            "overrides": [f"model.{option}={value}" for option, value in changes.items()],
            "warnings": list(unused_options(own.model).values()),
        }
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print one column a config, and differences from the first where there are several."""
    from rich.console import Console
    from rich.table import Table

    console, first = Console(), next(iter(result.values()))
    for name, described in result.items():
        console.print(f"[bold]{name}[/bold]", *described["overrides"])
        console.print("  " + "\n  ".join(described["layout"]), highlight=False)
        if loops := described.get("training loops"):
            shares = ", ".join(f"{T} in {share:.1%}" for T, share in loops.items())
            console.print(f"  loops of training steps: {shares}", highlight=False)
        for warning in described["warnings"]:
            console.print(f"  warning: {warning}")
        console.print()
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in result:
        table.add_column(name, justify="right", overflow="fold")
    for label, value, shown in ROWS:
        cells = []
        for described in result.values():
            number, reference = value(described), value(first)
            difference = number / reference - 1 if reference else 0
            more = f" ({difference:+.1%})" if abs(difference) >= 0.0005 else ""
            cells.append(shown(number) + more)
        table.add_row(label, *cells)
    console.print(table)


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f}"


def _bytes(number: float) -> str:
    size, unit = (GIB, "GiB") if number >= GIB else (MIB, "MiB")
    return f"{number / size:,.2f} {unit}"


# (label, its value in a description, how it is shown)
ROWS: list[tuple[str, Callable[[dict[str, Any]], float], Callable[[float], str]]] = [
    ("parameters", lambda d: d["parameters"]["total"], _count),
    (
        "  without embeddings",
        lambda d: d["parameters"]["total"] - d["parameters"]["embedding"],
        _count,
    ),
    ("  embeddings", lambda d: d["parameters"]["embedding"], _count),
    ("  gates of loops", lambda d: d["parameters"]["gates"], _count),
    ("sequence length", lambda d: d["seq_len"], _count),
    ("training FLOPs per token", lambda d: d["flops"]["training, per token"], _count),
    ("FLOPs to prefill a sequence", lambda d: d["flops"]["prefill of seq_len tokens"], _count),
    ("sequences of a micro-batch", lambda d: d["memory"]["batch_size"], _count),
    ("weights per GPU, fp32", lambda d: d["memory"]["weights"], _bytes),
    ("  gradients", lambda d: d["memory"]["gradients"], _bytes),
    ("  optimizer state", lambda d: d["memory"]["optimizer"], _bytes),
    ("  gathered weights", lambda d: d["memory"]["gathered"], _bytes),
    *(
        (f"  peak, recomputing {mode}, about", lambda d, m=mode: d["memory"]["peak"][m], _bytes)
        for mode in ACTIVATION_CHECKPOINTING
    ),
    ("cache of a sequence, bf16", lambda d: d["cache"]["per sequence"], _bytes),
    ("  of it growing with length", lambda d: d["cache"]["growing"], _bytes),
    *(
        row
        for n in DECODE_BATCHES
        for row in (
            (
                f"bytes of a decode step, batch {n}",
                lambda d, n=n: d["decode"][f"batch {n}"]["bytes per step"],
                _bytes,
            ),
            (
                "  tokens/s at most",
                lambda d, n=n: d["decode"][f"batch {n}"]["tokens/s at most"],
                _count,
            ),
        )
    ),
]


def describe_budget(given: DescribeArgs, budget: Budget, overrides: Sequence[str]) -> None:
    """Print and draw what the budget buys for each config."""
    result = {}
    if given.out is not None:
        import_pyplot(needed_by="the picture")
        make_writable("out", Path(given.out).parent)
    for name, path in zip(config_names(given.config), given.config, strict=True):
        args = read_config(path, overrides)
        check_tensor_parallel(build_on_meta(args.model), args.distributed.tp_size)
        own, counts = args.model.loop_count, given.loop_counts
        if counts is None:
            has_segments = "->" in str(args.model.attention_pattern)
            counts = [own] if has_segments else sorted({*DEFAULT_LOOPS, own})
        for loop_count in counts:
            try:
                replace(args.model, loop_count=loop_count).layout()
            except UserError as error:
                raise UserError(f"loop_counts={format_value(counts)}: {error}") from None
        counts = sorted(set(counts))
        found, notes = partners(name, budget, args, counts, given.by, given.bandwidth)
        result[name] = as_dict(budget, found, notes)
        if given.format == "table":
            print_budget(name, budget, found, notes, own, given.bandwidth)
        if given.out is not None:
            draw(found, budget, name, Path(given.out))
    if given.format == "json":
        print_text(json.dumps(result, indent=2))
    elif given.out is not None:
        print(f"figure: {given.out}")


def main(argv: list[str]) -> None:
    given, overrides = parse(argv)
    if (budget := given.budget()) is not None:
        describe_budget(given, budget, overrides)
        return
    result = describe_all(given, overrides)
    if given.format == "json":
        print_text(json.dumps(result, indent=2))
    else:
        print_table(result)
        print(
            f"tokens/s at most: computed with bandwidth={given.bandwidth:g} TB/s; an H100 has 3.35"
        )


if __name__ == "__main__":
    run_cli(main)
