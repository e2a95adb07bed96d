"""Run the synthetic curriculum: which arrays can looped models of several mixers track and read?

    python -m apps.LT2.scripts.curriculum size=tiny dump_dir=runs/curriculum_tiny
    python -m apps.LT2.scripts.curriculum dump_dir=runs/curriculum jobs=12 minutes=10
    python -m apps.LT2.scripts.curriculum arms=[full,gdn] loops=[4] n=[8,16] seeds=1 dry_run=true

An arm trains at n = 8, 16, 32, ... A stage passes when the accuracy on held-out examples reaches
90%; the next one starts from its weights, with a new optimizer. n_max is the last stage that
passed. configs/curriculum/curriculum.yaml has the arms, and other options are training options.
The same command skips finished stages, resumes the others, and writes to dump_dir

    curriculum.md       the report: claims, table of n_max, plot, how to repeat it
    curriculum.png      accuracy against the steps of all stages
    curriculum.jsonl    the results of each stage
    arm=.../            a stage is a run like any other

The task is from the LT2 paper (https://arxiv.org/abs/2605.20670, section 3.6), as in
lingua/dataloader/synthetic/state_tracking.py.
"""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, ClassVar

import torch

from apps.LT2.flops import cache_bytes, train_flops_per_token
from apps.LT2.scripts.curriculum_report import LENGTH, LOOPS, Chain, Outcome, Stage, write_report
from apps.LT2.scripts.study import (
    StudyArgs,
    build,
    check_failed,
    find_folder,
    limited,
    plan_jobs,
    run_jobs,
    split_options,
    update_record,
    with_options,
)
from apps.LT2.scripts.study_spec import Study
from lingua.args import dataclass_from_dict, load_config_file, print_text
from lingua.config.cli import split_paths
from lingua.config.help import format_value
from lingua.errors import UserError, run_cli
from lingua.evaluations import label_of
from lingua.run_columns import scientific, short
from lingua.slurm.script import Job
from lingua.slurm.sweep_plan import named_errors

SPEC = Path(__file__).parents[1] / "configs" / "curriculum" / "curriculum.yaml"
INIT = "checkpoint.init_ckpt_path"
BATCH_SIZE = "data.batch_size"
TOKENS, MIN_EXAMPLES = 8192, 16  # of an optimizer step, unless data.batch_size is given
OF_THIS_CALL = ("dump_dir", "jobs", "minutes")  # don't change the results


@dataclass
class CurriculumArgs(StudyArgs):
    OTHER_OPTIONS: ClassVar = " Other options are training options, for all stages."

    # tiny: seconds, to test the command, every stage passes; small: 4,000 steps a stage; full:
    # 100,000, as in the paper
    size: str = "small"
    loops: list[int] | None = None  # T; null = as the size says
    n: list[int] | None = None  # stages: bits of the array, and swaps; null = as the size says

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("loops", "n"):
            values = getattr(self, name)
            if values is not None and (not values or any(a >= b for a, b in pairwise(values))):
                text = format_value(values)
                raise UserError(f"{name}={text} must be numbers in ascending order, e.g. [8, 16]")


@dataclass
class Spec:
    """What curriculum.yaml says about a size."""

    question: str
    config: str
    arms: dict[str, Any]
    n: list[int]
    loops: list[int]
    seeds: int = 3
    default_arms: list[str] | None = None  # null = all
    options: dict[str, Any] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)


# ---- the plan


def read_study(args: CurriculumArgs, given: dict[str, Any]) -> Study:
    """Return the curriculum as a study of arms over T and n. UserError for a mistake."""
    spec = load_config_file(SPEC)
    sizes = spec.pop("sizes")
    if args.size not in sizes:
        raise UserError(f"size={args.size} must be one of {', '.join(sizes)}")
    found = dataclass_from_dict(Spec, spec | sizes[args.size])
    args.check_arms(found.arms)
    study = Study(
        name="curriculum",
        question=found.question,
        arms={arm: found.arms[arm] for arm in args.arms or found.default_arms or found.arms},
        config=str(SPEC.with_name(found.config)),
        options=found.options,
        over={LOOPS: args.loops or found.loops, LENGTH: args.n or found.n},
        seeds=args.seeds or found.seeds,
        columns={"n_max": "n_max"},
        claims=[{"column": "n_max", **claim} for claim in found.claims],
        size=args.size,
        sizes=list(sizes),
    )
    return with_options(study, given)


def plan_chains(study: Study, folder: Path) -> list[Chain]:
    """Check all stages, and compute what they cost. Seeds vary slowest."""
    planned = []
    for arm, n_loops in product(study.arms, study.over[LOOPS]):
        stages = []
        for n in study.over[LENGTH]:
            over = {LOOPS: n_loops, LENGTH: n}
            options = {**study.options, **study.arms[arm], **over}
            with named_errors(label_of({"arm": arm, **over})):
                args, model = build(study, options)
            seq_len = args.data.seq_len
            options.setdefault(BATCH_SIZE, max(TOKENS // seq_len, MIN_EXAMPLES))
            cost = train_flops_per_token(model, seq_len)
            tokens = math.prod((args.steps, options[BATCH_SIZE], args.grad_acc_steps, seq_len))
            n_parameters = sum(p.numel() for p in model.parameters())
            state_bytes = cache_bytes(model, seq_len, torch.bfloat16)
            flops, facts = float(tokens * cost), (n, args.steps, cost, state_bytes)
            stages.append(Stage(arm, over, options, flops, n_parameters, *facts))
        planned.append((arm, n_loops, stages))
    seeds = range(1, study.seeds + 1)
    return [Chain(arm, T, seed, stages, folder) for seed in seeds for arm, T, stages in planned]


def recorded_chains(record: dict[str, Any], folder: Path) -> list[Chain]:
    """Return the chains of this and of earlier commands."""
    chains: dict[tuple[str, int, int], Chain] = {}
    for label, seed, facts in record["stages"]:
        stage = Stage(options=record["runs"][label], **facts)
        key = (stage.arm, stage.over[LOOPS], seed)
        chains.setdefault(key, Chain(*key, [], folder)).stages.append(stage)
    for chain in chains.values():
        chain.stages.sort(key=lambda stage: stage.n)
    arms = list(load_config_file(SPEC)["arms"])
    return sorted(chains.values(), key=lambda c: (c.seed, arms.index(c.arm), c.n_loops))


def check_order(chains: Sequence[Chain], given: Sequence[int]) -> None:
    """Raise UserError unless new stages, of `given` n, come after all that have run."""
    for chain in chains:
        has_run = [(chain.run(stage) / "metrics.jsonl").exists() for stage in chain.stages]
        for i, stage in enumerate(chain.stages):
            before = {s.n for s, has in zip(chain.stages[:i], has_run[:i], strict=True) if has}
            if has_run[i] or stage.n not in given:
                continue
            if any(has_run[i:]):
                raise UserError(
                    f"n={stage.n} comes before stages of {chain.name} that have run; name another "
                    "dump_dir"
                )
            if left := sorted(before - set(given)):
                raise UserError(
                    f"n leaves out {left[0]}, which {chain.name} has run in dump_dir; add it, or "
                    "name another dump_dir"
                )


def format_plan(study: Study, chains: Sequence[Chain]) -> str:
    lines = [f"curriculum, size={study.size}, n = {', '.join(map(str, study.over[LENGTH]))}:"]
    for chain in chains[: len(chains) // study.seeds]:
        last = chain.stages[-1]
        facts = f"{short(last.parameters)} parameters, up to {last.steps} steps a stage and "
        flops = sum(stage.flops for stage in chain.stages)
        lines.append(f"  {chain.name}: {facts}{scientific(flops)} FLOPs")
    total = sum(stage.flops for chain in chains for stage in chain.stages)
    n_stages = sum(len(chain.stages) for chain in chains)
    of_seeds = f"seeds={study.seeds}: at most {n_stages} stages, {scientific(total)} FLOPs"
    return "\n".join([*lines, f"  {of_seeds}"])


# ---- the runs


def format_outcome(outcome: Outcome) -> str:
    if not outcome.curve:
        return ""
    step, accuracy = outcome.curve[-1]
    if outcome.is_passed:
        return f"passed at step {step:,}, accuracy {accuracy:.3f}"
    state = "not passed" if outcome.is_done else "not finished"
    return f"{state}, accuracy {accuracy:.3f} after {step:,} steps"


def run_chains(
    study: Study, folder: Path, chains: Sequence[Chain], jobs: int | None, **own: Any
) -> list[str]:
    """Run the stages of every chain, each after the one before, until the time ends.

    Return the labels of stages that failed. Their chains end here.
    """
    lost: list[str] = []
    by_label: dict[str, tuple[Chain, Stage]] = {}

    def next_run(chain: Chain) -> tuple[Stage, int] | None:
        stage = chain.next_stage()
        if stage is None:
            return None
        label = stage.label(chain.seed)
        by_label[label] = chain, stage
        if passed := chain.passed():
            before = chain.run(passed[-1])
            if not any((run / "checkpoints").is_dir() for run in (before, chain.run(stage))):
                lost.append(label)
                print(f"curriculum: {label} can't start: {before}/checkpoints is missing")
                return None
            stage = replace(stage, options={**stage.options, INIT: str(before)})
        return stage, chain.seed

    def follow(label: str) -> tuple[Job, float] | None:
        chain, _ = by_label[label]
        for stage in chain.passed()[:-1]:  # only the newest weights are needed
            shutil.rmtree(chain.run(stage) / "checkpoints", ignore_errors=True)
        if (found := next_run(chain)) is None:
            return None
        return plan_jobs(study, folder, [found])[0], found[0].flops

    def result(label: str) -> str:
        chain, stage = by_label[label]
        return format_outcome(chain.outcome(stage))

    runs = [found for chain in chains if (found := next_run(chain)) is not None]
    costs = {folder / stage.label(seed): stage.flops for stage, seed in runs}
    if not runs:
        return lost
    own |= {"then": follow, "result": result}
    failed = run_jobs(plan_jobs(study, folder, runs), jobs, costs, **own)
    return failed + lost


# ---- the command


def main(argv: list[str]) -> None:
    started = time.monotonic()
    names, options = split_paths(argv)
    if names:
        raise UserError(f"{names[0]}: write option=value, e.g. arms=[{names[0]}]")
    prog = "python -m apps.LT2.scripts.curriculum"
    args, given = split_options(CurriculumArgs, options, prog, __doc__)
    study = read_study(args, given)
    folder = find_folder(args, study)
    chains = plan_chains(study, folder)
    print_text(format_plan(study, chains))
    if args.dry_run:
        return
    runs = [(stage, chain.seed) for chain in chains for stage in chain.stages]
    record = update_record(
        folder, study, {stage.label(seed): stage.options for stage, seed in runs}
    )
    facts = {label: [label, seed, facts] for label, seed, facts in record.get("stages", [])}
    facts |= {s.label(seed): [s.label(seed), seed, facts_of(s)] for s, seed in runs}
    record["stages"] = list(facts.values())
    everything = recorded_chains(record, folder)
    own = {(chain.name, chain.seed) for chain in chains}
    check_order([c for c in everything if (c.name, c.seed) in own], study.over[LENGTH])
    command = shlex.join(x for x in options if x.partition("=")[0] not in OF_THIS_CALL)
    record["commands"] = list(dict.fromkeys([*record.get("commands", []), command]))
    swept = {stage.label(seed): stage.swept(seed) for stage, seed in runs}
    with limited(folder, record, swept, started, args.minutes) as limits:
        failed = run_chains(study, folder, chains, args.jobs, **limits)
        write_report(study, folder, record, everything, find_not_run(study, everything))
    check_failed(failed, folder)


def find_not_run(study: Study, chains: Sequence[Chain]) -> list[str]:
    """List the arms and sizes of the curriculum that the folder doesn't have."""
    have = {chain.arm for chain in chains}
    left = [f"arm={arm}" for arm in load_config_file(SPEC)["arms"] if arm not in have]
    return [*left, *(f"size={s}" for s in study.sizes if s not in (study.size, "tiny"))]


def facts_of(stage: Stage) -> dict[str, Any]:
    """Return the fields of a stage, without its options."""
    return {f.name: getattr(stage, f.name) for f in fields(stage) if f.name != "options"}


if __name__ == "__main__":
    run_cli(main)
