"""Summarize a run at its start, for the log."""

from __future__ import annotations

from pathlib import Path

import torch

from apps.LT2.flops import count_parameters
from apps.LT2.pattern import format_layout
from apps.LT2.training.args import TrainArgs
from apps.LT2.training.trainer import Trainer
from apps.LT2.transformer import LoopedTransformer
from lingua.parallel.args import resolve_dtype

MAX_SOURCES = 4  # named in the summary
LABEL_WIDTH = 9


def format_summary(trainer: Trainer, world_size: int) -> str:
    """Return a table of the model, its layout, the data, the devices and the steps."""
    args, model, tokens_per_step = trainer.args, trainer.model, trainer.tokens_per_step
    rows = [
        ("model", _describe_model(model)),
        ("layout", format_layout(model.inference_layout, model.layout_plan.random_loops)),
        ("data", _describe_data(args)),
        ("devices", _describe_devices(args, trainer.device, world_size)),
        ("batch", f"{tokens_per_step:,} tokens a step: {_describe_batch(args)}"),
        ("steps", _describe_steps(trainer)),
        ("config", str(Path(args.dump_dir, "config.yaml"))),
    ]
    lines = [f"run {args.name}"]
    for label, text in rows:
        first, *rest = text.splitlines()
        lines += [label.ljust(LABEL_WIDTH) + first, *(" " * LABEL_WIDTH + line for line in rest)]
    return "\n".join(lines)


def _describe_model(model: LoopedTransformer) -> str:
    n_layers, n_loops, count = model.args.n_layers, model.args.loop_count, count_parameters(model)
    parts = {"layers": count.body, "embeddings": count.embedding, "gates": count.gates}
    listed = ", ".join(f"{n:,} in {name}" for name, n in parts.items() if n)
    return (
        f"{n_layers} layers x {n_loops} loops, dim {model.args.dim}\n"
        f"{count.total:,} parameters: {listed}"
    )


def _describe_data(args: TrainArgs) -> str:
    data, total = args.data, sum(args.data.sources.values())
    listed = [f"{name} ({weight / total:.0%})" for name, weight in data.sources.items()]
    if len(listed) > MAX_SOURCES:
        listed[MAX_SOURCES - 1 :] = [f"{len(listed) - MAX_SOURCES + 1} more"]
    tokenizer = data.tokenizer.name + (f" ({data.tokenizer.path})" if data.tokenizer.path else "")
    return (
        f"{', '.join(listed)} in {data.root_dir}\n"
        f"tokenizer {tokenizer}, vocabulary {args.model.vocab_size:,}"
    )


def _describe_devices(args: TrainArgs, device: torch.device, world_size: int) -> str:
    distributed = args.distributed
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype = str(resolve_dtype(distributed.model_dtype, device.type)).removeprefix("torch.")
    degrees = {n: getattr(distributed, n) for n in ("dp_replicate", "dp_shard", "tp_size")}
    parts = [f"{world_size} x {name}", *(f"{n}={k}" for n, k in degrees.items() if k > 1), dtype]
    if distributed.compile:
        parts.append("compiled (the first step may take minutes)")
    return ", ".join(parts)


def _describe_batch(args: TrainArgs) -> str:
    degree = args.distributed.dp_replicate * args.distributed.dp_shard
    factors = {
        "sequences": args.data.batch_size,
        "micro-batches": args.grad_acc_steps,
        "ranks": degree,
    }
    shown = [f"{n} {name}" for name, n in factors.items() if n > 1 or name == "sequences"]
    return " x ".join([*shown, f"{args.data.seq_len} tokens"])


def _describe_steps(trainer: Trainer) -> str:
    n_steps, step = trainer.args.steps, trainer.state.step
    resumed = f", {step:,} of them done" if step else ""
    return f"{n_steps:,} ({n_steps * trainer.tokens_per_step:,} tokens){resumed}"
