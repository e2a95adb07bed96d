"""Measure prefill and decode of configs on this device: time, memory, and share of its ceilings.

    python -m apps.LT2.benchmark_prefill \\
        --config apps/LT2/configs/1B/looped_hybrid_gdn_4to1_1B.yaml --seq-len 8192

    ... --config A.yaml B.yaml --seq-len 1024 8192 --batch-size 1 16 model.loop_count=2 --plot x.png
    ... --compare A.yaml B.yaml --seq-len 8192      alternately, with the speed of B relative to A

Weights are random. First the device's ceilings are measured: its copy bandwidth, and its rate in a
large matrix product. Each row has two costs. Prefill: the time of a whole prompt, and its FLOP/s as
a share of that product (MFU). Decode: the time of a step, and the bytes it must move as a share of
the copy bandwidth (MBU). FLOPs, weights and caches count in every loop. The last line of stdout is
the whole result as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from apps.LT2.benchmark.inference_cost import Cost, Plan, Ratio, Row, measure_point
from apps.LT2.benchmark.timing import (
    Ceilings,
    Spread,
    environment,
    is_out_of_memory,
    measure_ceilings,
    release_memory,
)
from apps.LT2.flops import count_parameters
from apps.LT2.inference.compiled import compile_layers
from apps.LT2.inference.load import (
    cast_for_inference,
    check_kernels,
    fuse_projections,
    resolve_device,
)
from apps.LT2.inference.quantize import WEIGHTS, check_weights, quantize_int8, unread_int8
from apps.LT2.kernel.attention import check_attention_device
from apps.LT2.scripts.plot_benchmark import check_can_draw, draw
from apps.LT2.training.args import TrainArgs
from apps.LT2.training.unused_options import unused_options
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.args import parse_args
from lingua.config.cli import OneLineParser, config_names
from lingua.dataloader.synthetic.args import build_task
from lingua.errors import UserError, run_cli
from lingua.parallel.args import DTYPES, resolve_dtype
from lingua.tokenizer import build_tokenizer, find_tokenizer_file

LLAMA3_VOCAB = 128_256  # vocabulary of the recipes' tokenizer
AT_LEAST_ONE = ("seq_len", "batch_size", "decode_tokens", "repeats", "warmup")
AT_LEAST_ONE += ("prefill_chunk", "max_prefill")
READ_OPTIONS = ("model.", "data.tokenizer.")  # the options of a config that this benchmark reads


@dataclass(frozen=True)
class Subject:
    name: str
    path: str
    args: LoopedTransformerArgs
    vocabulary: str  # source of its size


# ---- options


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse and check the options. Return them, and every `key=value` as an override."""
    parser = OneLineParser(
        prog="python -m apps.LT2.benchmark_prefill",
        description=(__doc__ or "").splitlines()[0],
        epilog="key=value overrides an option of all configs, as in model.loop_count=2. A config "
        "without a layer that uses it prints a warning. config=FILE.yaml is --config FILE.yaml.",
    )
    add = parser.add_argument
    add("--config", nargs="+", default=[], metavar="YAML", help="recipes, measured sequentially")
    add("--compare", nargs=2, metavar=("A", "B"), help="two recipes, measured alternately")
    add("--seq-len", nargs="+", type=int, default=[1024], metavar="N", help="tokens of a prompt")
    add("--batch-size", nargs="+", type=int, default=[1], metavar="N", help="sequences at once")
    add("--decode-tokens", type=int, default=32, metavar="N", help="steps of a repeat")
    add(
        "--prefill-chunk", type=int, metavar="N", help="prefill in chunks of N tokens, not compiled"
    )
    add(
        "--max-prefill", type=int, metavar="N", help="no prefill of more than N tokens in the batch"
    )
    add("--repeats", type=int, default=5, metavar="N", help="measurements per point")
    add("--warmup", type=int, default=2, metavar="N", help="runs before the measurements")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16 on a GPU")
    add("--weights", choices=WEIGHTS, default="auto", help="int8: 8-bit weights for decode steps")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--no-compile", action="store_true", help="run layers eagerly (always on a CPU)")
    add("--compile-once", action="store_true", help="compile for all lengths, not for each of them")
    add("--no-cuda-graph", action="store_true", help="decode without a CUDA graph")
    add("--plot", type=Path, metavar="PNG", help="plot tokens/s against length")
    given, overrides = parser.parse_with_overrides(argv)
    given.config += [arg.removeprefix("config=") for arg in overrides if arg.startswith("config=")]
    parser.require_positive(given, *AT_LEAST_ONE)
    if bool(given.config) == bool(given.compare):
        raise UserError("name what to measure: --config X.yaml [Y.yaml ...] or --compare A B")
    return given, [arg for arg in overrides if not arg.startswith("config=")]


def read_subjects(paths: Sequence[str], overrides: Sequence[str]) -> list[Subject]:
    for override in overrides:
        if not override.startswith(READ_OPTIONS):
            raise UserError(
                f"{override}: only {' and '.join(f'{o}*' for o in READ_OPTIONS)} options apply here"
            )
    named = zip(config_names(paths), paths, strict=True)
    return [read_subject(name, path, overrides) for name, path in named]


def read_subject(name: str, path: str, overrides: Sequence[str]) -> Subject:
    config = parse_args(TrainArgs, [f"config={path}", *overrides])
    args = config.model.with_loops(config.model.loop_count)  # inference has no schedule of loops
    tokenizer = config.data.tokenizer
    if args.vocab_size != -1:
        return Subject(name, path, args, "model.vocab_size")
    if config.data.task is not None:
        task = build_task(config.data.task)
        return Subject(name, path, replace(args, vocab_size=task.n_tokens), f"task {task.name}")
    try:
        find_tokenizer_file(tokenizer.name, tokenizer.path)
    except UserError:
        size, origin = LLAMA3_VOCAB, f"Llama 3's, because {tokenizer.path} is missing"
    else:
        size = build_tokenizer(tokenizer.name, tokenizer.path).n_words
        origin = f"tokenizer {tokenizer.name}"
    return Subject(name, path, replace(args, vocab_size=size), origin)


def build_on_meta(subject: Subject, device: torch.device, dtype: torch.dtype) -> LoopedTransformer:
    """Build the model without memory. UserError if it is invalid, or cannot run on this device."""
    args = subject.args
    check_kernels(args, device.type)
    check_attention_device(args.attn_impl, device_type=device.type, dtype=dtype)
    with torch.device("meta"):
        return LoopedTransformer(args)


def build(
    subject: Subject, device: torch.device, dtype: torch.dtype, plan: Plan
) -> LoopedTransformer:
    """Build the model with random weights: 2-D parameters in `dtype`, 1-D in fp32."""
    model = build_on_meta(subject, device, dtype)
    try:
        model.to_empty(device=device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{subject.name}: the weights do not fit on {device}") from None
    torch.manual_seed(subject.args.seed or 0)
    model.init_weights()
    cast_for_inference(model, dtype)
    fuse_projections(model)
    if plan.weights == "int8":
        quantize_int8(model)
    if plan.compiled:
        compile_layers(model, "step", dynamic=None if plan.compile_once else False)
        if plan.prefill_chunk is None:
            compile_layers(model, "prefill", dynamic=plan.compile_once)
    return model.requires_grad_(False).eval()


# ---- the measurement


class Report:
    """Collects rows for the JSON, and prints each as a line."""

    def __init__(self, width: int):
        self.width = width  # of the column of names
        self.rows: list[Row] = []
        self.ratios: list[Ratio] = []
        self.refused: dict[str, str] = {}  # config -> why it cannot run here

    def print_header(self) -> None:
        both = f"{'ms':>9s} {'(quartiles)':>21s} {'tokens/s':>9s} {'share':>6s} {'GiB':>5s}"
        print(
            f"\n{'':{self.width}s} {'':>5s} {'':>7s} {'cache MiB':>9s} | "
            f"{'prefill, share of FLOP/s':^54s} | {'decode step, share of bandwidth':^54s}\n"
            f"{'config':{self.width}s} {'batch':>5s} {'length':>7s} {'/sequence':>9s} | "
            f"{both} | {both}",
            flush=True,
        )

    def add(self, rows: list[Row], ratio: Ratio | None) -> None:
        self.rows += rows
        for row in rows:
            print(
                f"{row.config:{self.width}s} {row.batch_size:5d} {row.seqlen:7d} "
                f"{row.cache_mib:9.2f} | {format_cost(row.prefill)} | {format_cost(row.decode)}",
                flush=True,
            )
        if ratio is not None:
            self.ratios.append(ratio)
            print(
                f"{rows[1].config}, speed relative to {rows[0].config}: "
                f"prefill {format_ratio(ratio.prefill)}, decode {format_ratio(ratio.decode)}",
                flush=True,
            )

    def refuse(self, name: str, reason: str) -> None:
        self.refused[name] = reason
        print(f"{name:{self.width}s} refused: {reason}", flush=True)


def format_cost(cost: Cost) -> str:
    if cost.ms is None or cost.quartiles_ms is None:
        return f"{cost.problem:^54s}"
    low, high = cost.quartiles_ms
    peak = "" if cost.peak_gib is None else f"{cost.peak_gib:.1f}"
    spread = f"({low:.3f}-{high:.3f})"
    return (
        f"{cost.ms:9.3f} {spread:>21s} {cost.tokens_per_s:9.0f} "
        f"{100 * (cost.share or 0):5.1f}% {peak:>5s}"
    )


def format_ratio(ratio: Spread | None) -> str:
    if ratio is None:
        return "unknown"
    return f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})"


def measure_all(
    groups: Sequence[Sequence[Subject]],
    given: argparse.Namespace,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    report: Report,
) -> None:
    """Measure every group at every batch size and length. Subjects of a group alternate."""
    for group in groups:
        try:
            models = {s.name: build(s, device, dtype, plan) for s in group}
        except UserError as error:
            if len(groups) == 1:
                raise
            report.refuse(group[0].name, str(error))
            continue
        for batch_size in given.batch_size:
            for seqlen in given.seq_len:
                report.add(*measure_point(models, batch_size, seqlen, plan, ceilings))
        del models
        release_memory()


def make_plan(given: argparse.Namespace, device: torch.device) -> Plan:
    on_gpu = device.type == "cuda"
    return Plan(
        repeats=given.repeats,
        warmup=given.warmup,
        decode_tokens=given.decode_tokens,
        prefill_chunk=given.prefill_chunk,
        weights=given.weights,
        max_prefill=given.max_prefill,
        compile_once=given.compile_once,
        compiled=on_gpu and not given.no_compile,
        cuda_graph=on_gpu and not given.no_cuda_graph,
    )


def describe(subject: Subject) -> dict[str, Any]:
    """Count the model's parameters without memory; {} if the config is invalid."""
    try:
        with torch.device("meta"):
            parameters = count_parameters(LoopedTransformer(subject.args))
    except UserError:
        return {}
    return {"body_parameters": parameters.body, "embedding_parameters": parameters.embedding}


def main(argv: list[str]) -> None:
    given, overrides = parse_options(argv)
    device = resolve_device(given.device)
    dtype = resolve_dtype(given.dtype, device.type)
    check_weights(given.weights, device, dtype)
    if given.plot is not None:
        check_can_draw(given.plot)
    subjects = read_subjects(given.compare or given.config, overrides)
    groups = [subjects] if given.compare else [[subject] for subject in subjects]
    if len(groups) == 1:  # with several groups, one that cannot run is a row
        for subject in subjects:
            build_on_meta(subject, device, dtype)
    plan = make_plan(given, device)
    result = environment(device) | {
        "dtype": str(dtype).removeprefix("torch."),
        "plan": asdict(plan),
        "argv": argv,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()},
        "overrides": overrides,
    }
    print(
        f"{result['device']}, torch {result['torch']}, commit {result['commit']}, "
        f"{result['dtype']}, {'compiled' if plan.compiled else 'eager'}, decode "
        f"{'by CUDA graph' if plan.cuda_graph else 'without CUDA graph'}"
    )
    configs = [asdict(subject) | describe(subject) for subject in subjects]
    for config in configs:
        args = config["args"]
        body = f"{config['body_parameters'] / 1e6:.1f}M" if "body_parameters" in config else "?"
        print(
            f"{config['name']}: {body} parameters without embeddings, T = {args['loop_count']}, "
            f"vocabulary {args['vocab_size']} ({config['vocabulary']})"
        )
    for subject in subjects:
        with suppress(UserError):  # a config that can't be built is reported with its row
            for warning in unused_options(subject.args).values():
                print(f"{subject.name}: {warning}")
        for batch_size in given.batch_size if given.weights == "int8" else []:
            warning = unread_int8(subject.args.dim, batch_size, "--batch-size")
            if warning is not None:
                print(f"{subject.name}: {warning}")
    ceilings = measure_ceilings(device, dtype)
    print(format_ceilings(ceilings), flush=True)

    report = Report(width=max(len(subject.name) for subject in subjects))
    report.print_header()
    measure_all(groups, given, plan, device, dtype, ceilings, report)
    result |= {
        "configs": configs,
        "ceilings": asdict(ceilings),
        "rows": [asdict(row) for row in report.rows],
        "ratios": [asdict(ratio) for ratio in report.ratios],
        "refused": report.refused,
    }
    if given.plot is not None:
        draw([result], given.plot)
        print(f"figure: {given.plot}")
    print(json.dumps(result, allow_nan=False))


def format_ceilings(ceilings: Ceilings) -> str:
    sheet = ceilings.datasheet_flops
    known = "" if sheet is None else f" (data sheet: {sheet / 1e12:.0f})"
    return (
        f"measured ceilings: copy {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s read and "
        f"written, matrix product {ceilings.matmul_flops / 1e12:.3g} TFLOP/s{known}"
    )


if __name__ == "__main__":
    run_cli(main)
