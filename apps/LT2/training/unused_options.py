"""Warn about options that are set and have no effect, or probably not the intended one.

An option counts as set if it differs from its default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from typing import Any

from apps.LT2.mixers import MIXERS
from apps.LT2.training.args import TrainArgs
from apps.LT2.training.step_graph import why_no_step_graph
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.config.help import format_value
from lingua.data import find_unread_folders
from lingua.optim import find_unused_options
from lingua.tokenizer import TokenizerArgs
from lingua.transformer import depth_factor


def train_warnings(args: TrainArgs) -> list[str]:
    """Return the warnings for a run, one line each. The defaults of `args` must be filled in."""
    return [
        *unused_options(args.model).values(),
        *_unused_scaling(args.model),
        *_ineffective_limits(args.model),
        *_wide_init(args.model),
        *_unused_loops(args),
        *_unused_train_options(args),
    ]


def options_without_effect(args: TrainArgs) -> dict[str, str]:
    """Map the dotted options that change nothing in this run, whatever their values, to reasons."""
    optim = f"optim.name={args.optim.name} with scheduler={args.optim.scheduler} does not use it"
    reasons = _reasons(args.model)
    wider = replace(args.model, default_sliding_window=args.model.default_sliding_window + 1)
    if wider.layout() == args.model.layout():
        reasons["default_sliding_window"] = "no layer takes its window from it"
    unused = {f"model.{name}": reason for name, reason in reasons.items()}
    if args.model.loop_schedule is None:
        unused["optim.rewarmup"] = "model.loop_schedule is null"
    if args.model.loop_loss != "gate":
        unused["model.loop_entropy"] = "model.loop_loss is not gate"
    if args.model.loop_loss == "none":
        unused["model.loop_loss_every"] = "model.loop_loss is none"
    return unused | {f"optim.{name}": optim for name in find_unused_options(args.optim)}


def unused_options(args: LoopedTransformerArgs) -> dict[str, str]:
    """Return {name: warning} for each option of `model:` that is set and that no layer uses."""
    reasons, used = _reasons(args), _mixers(args)
    return {
        name: f"model.{name}{_value(args, name)} has no effect: {reasons[name]}, and all layers "
        f"are {_names(used)}; remove it"
        for name in sorted(reasons)
        if getattr(args, name) != getattr(type(args)(), name)
    }


def _reasons(args: LoopedTransformerArgs) -> dict[str, str]:
    """Return {name: reason} for each option of `model:` that no layer uses, set or not.

    default_sliding_window is exempt, except in a sweep: recipes set it with and without windows.
    """
    used = _mixers(args)
    reasons: dict[str, str] = {}
    for name in frozenset().union(*(mixer.reads for mixer in MIXERS.values())):
        readers = _readers(name)
        if name == "head_dim" and args.n_heads is None:
            readers |= _readers("n_heads")  # the number of heads is then dim / head_dim
        if not used & readers:
            reasons[name] = f"only {_names(readers)} layers use it"
    if all(getattr(getattr(args, name, None), "n_heads", None) for name in used):
        reasons.setdefault("n_heads", "the sections of these layers set n_heads")
    before_narrowing = _mixers(replace(args, sliding_window=None))
    if "full" not in before_narrowing:
        reasons["sliding_window"] = "it only applies to full layers"
    for name in ("mixer", "hybrid_mixer"):
        if getattr(args, name) not in before_narrowing:
            reasons[name] = "model.attention_pattern gives it no layer"
    if used & _readers("attn_impl") == {"dsa"} and args.dsa.warmup_steps == 0:
        reasons["attn_impl"] = "dsa layers only use it during model.dsa.warmup_steps"
    for name in MIXERS.keys() - used:
        if is_dataclass(getattr(args, name, None)):
            reasons[name] = f"no layer is {name}"
    return reasons


def _unused_scaling(args: LoopedTransformerArgs) -> Iterator[str]:
    if args.rope_scaling is not None:
        for name in args.rope_scaling.unused_options():
            yield (
                f"model.rope_scaling.{name} has no effect with rope_type="
                f"{args.rope_scaling.rope_type}; remove it"
            )


def _ineffective_limits(args: LoopedTransformerArgs) -> Iterator[str]:
    windows = {spec.window for loop in args.layout() for spec in loop if spec.window is not None}
    for window in sorted(w for w in windows if w >= args.max_seqlen):
        yield (
            f"a window of {window} tokens is full attention with data.seq_len={args.max_seqlen}; "
            "reduce model.default_sliding_window or the window in model.attention_pattern"
        )
    if "dsa" in _mixers(args) and args.dsa.top_k >= args.max_seqlen:
        yield (
            f"model.dsa.top_k={args.dsa.top_k} is full attention with data.seq_len="
            f"{args.max_seqlen}; reduce it"
        )


def _wide_init(args: LoopedTransformerArgs) -> Iterator[str]:
    factor = depth_factor(args.init_std_factor, dim=args.dim, layer=0, n_layers=args.n_layers)
    if factor < 1:  # only dim_ratio
        base = args.init_base_std or args.dim**-0.5
        yield (
            f"model.init_std_factor={args.init_std_factor} divides by dim / 4096, so model.dim="
            f"{args.dim} initializes output projections with std {base / factor:.3g} instead of "
            f"{base:.3g}; use disabled, global_depth or current_depth"
        )


def _unused_loops(args: TrainArgs) -> Iterator[str]:
    model, plan, bptt = args.model, args.model.loop_plan(), args.model.loop_bptt
    # In a short run a phase of the schedule may have no step.
    scheduled = [plan.draw(s, args.steps) for s in plan.starts(args.steps) if s < args.steps]
    largest = max(scheduled or plan.shares())
    if largest < model.loop_count:
        is_short = largest < max(plan.shares())
        way = f"more than steps={args.steps}" if is_short else f"model.loop_count={largest}"
        yield (
            f"model.loop_count={model.loop_count}: no step runs more than {largest} loops, but "
            f"evaluation and generation run {model.loop_count}; set {way}"
        )
    if bptt is not None and bptt >= largest:
        yield f"model.loop_bptt={bptt} has no effect: no step runs more than {largest} loops"
    elif bptt is not None and not model.weight_tying:
        yield (
            f"model.loop_bptt={bptt}: no gradient reaches the input embedding in steps of more "
            f"than {bptt} loops; use model.weight_tying=true, or a checkpoint.init_ckpt_path"
        )
    if model.loop_loss != "none" and largest == 1:
        yield f"model.loop_loss={model.loop_loss} has no effect: no step runs more than 1 loop"
    if model.loop_loss != "gate" and model.loop_entropy != type(model).loop_entropy:
        yield (
            f"model.loop_entropy={model.loop_entropy} has no effect with model.loop_loss="
            f"{model.loop_loss}; only gate uses it"
        )
    if model.loop_loss == "none" and model.loop_loss_every > 1:
        yield (
            f"model.loop_loss_every={model.loop_loss_every} has no effect with "
            "model.loop_loss=none; use uniform, gate or a list of weights"
        )
    if args.optim.rewarmup and model.loop_schedule is None:
        yield f"optim.rewarmup={args.optim.rewarmup} has no effect without model.loop_schedule"
    if args.eval is not None and args.eval.harness is None and args.eval.generator.exit != "none":
        yield (
            f"eval.exit={args.eval.generator.exit} has no effect: validation in training runs all "
            "loops; use python -m apps.LT2.eval"
        )


def _unused_train_options(args: TrainArgs) -> Iterator[str]:
    acc_freq, keep = args.logging.acc_freq, args.checkpoint.eval.keep
    if acc_freq is not None and acc_freq >= args.grad_acc_steps:
        yield (
            f"logging.acc_freq={acc_freq} has no effect with grad_acc_steps={args.grad_acc_steps}; "
            "make it smaller, or null"
        )
    every, stop_at = args.checkpoint.eval.every, args.eval and args.eval.stop_at
    if stop_at is not None and not 0 < every < args.steps:
        yield (
            f"eval.stop_at={stop_at} has no effect with checkpoint.eval.every={every}: the run is "
            "evaluated at its end only; evaluate it more often"
        )
    if args.distributed.cuda_graph and (reason := why_no_step_graph(args)) is not None:
        yield f"distributed.cuda_graph=true has no effect with {reason}"
    if folders := find_unread_folders(args.data):
        root = args.data.root_dir
        yield (
            f"data.sources: the chunks in {root} itself are read, those in its folders "
            f"{', '.join(folders)} are not; to read these, name them in data.sources"
        )
    if args.data.task is not None and args.data.tokenizer != TokenizerArgs():
        yield (
            f"data.tokenizer.name={args.data.tokenizer.name} has no effect with data.task.name="
            f"{args.data.task.name}, which has its own tokens; remove it"
        )
    if args.async_eval_gpus is not None and (args.eval is None or args.eval.harness is None):
        yield (
            f"async_eval_gpus={args.async_eval_gpus} has no effect without eval.harness: training "
            "itself measures the validation loss; set eval.harness.tasks, or null"
        )
    elif args.async_eval_gpus is not None and keep > 0:
        yield (
            f"checkpoint.eval.keep={keep} with async_eval_gpus: a job that starts after {keep} "
            "more evaluations will not find its checkpoint"
        )


def _readers(option: str) -> set[str]:
    return {name for name, mixer in MIXERS.items() if option in mixer.reads}


def _mixers(args: LoopedTransformerArgs) -> set[str]:
    return {spec.mixer for loop in args.layout() for spec in loop}


def _value(args: LoopedTransformerArgs, name: str) -> str:
    value: Any = getattr(args, name)
    return "" if is_dataclass(value) else f"={format_value(value)}"


def _names(mixers: set[str]) -> str:
    return ", ".join(sorted(mixers, key=list(MIXERS).index))
