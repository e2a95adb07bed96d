"""Options of `data.task`, and the task that they describe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from lingua.dataloader.synthetic.copying import Copy
from lingua.dataloader.synthetic.mqar import MQAR
from lingua.dataloader.synthetic.needle import Needle
from lingua.dataloader.synthetic.permutation import Permutation
from lingua.dataloader.synthetic.state_tracking import StateTracking
from lingua.dataloader.synthetic.task import Task
from lingua.errors import UserError

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (StateTracking, MQAR, Permutation, Copy, Needle)
}
Value = int | float | str  # of an option


@dataclass
class TaskArgs:
    """Null means the default of the task. docs/data.md has a table of tasks and defaults."""

    NAMED_BY: ClassVar = "name"  # data.task=copy is data.task.name=copy

    name: str | None = None  # state_tracking | mqar | permutation | copy | needle
    n: int | None = None  # state_tracking: bits, permutation: elements, copy: tokens to copy
    n_swaps: int | None = None  # state_tracking: swaps of two pointers; null = n
    n_pointers: int | None = None  # state_tracking: pointers into the array
    n_addresses: int | None = None  # state_tracking: addresses that an array may have
    random_addresses: bool | None = None  # state_tracking: false = the first n addresses
    num_kv_pairs: int | None = None  # mqar: keys, each with a value
    input_seq_len: int | None = None  # mqar, needle: tokens of an example
    vocab_size: int | None = None  # mqar, copy, needle: tokens, without markers
    power_a: float | None = None  # mqar: the smaller, the sooner a key is asked for
    random_non_queries: bool | None = None  # mqar: false = tokens between the queries are 0
    group: str | None = None  # permutation: S5, A5, Z60, ...
    answers: str | None = None  # state_tracking, permutation: all (of the words so far) | last
    num_needle_k: int | None = None  # needle: needles in the haystack
    num_needle_q: int | None = None  # needle: needles that are asked for
    needle_len: int | None = None  # needle: tokens of a value

    def given(self) -> dict[str, Value]:
        """Return the options that are set, except the name."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "name"}

    def changed_by(self, changes: TaskArgs) -> TaskArgs:
        """Return these options with those that are set in `changes`."""
        if changes.name not in (None, self.name):
            return changes
        return replace(self, **changes.given())


def build_task(args: TaskArgs) -> Task:
    """Build the task of `args`. UserError for an impossible task."""
    known = ", ".join(TASKS)
    if args.name not in TASKS:
        value = "null" if args.name is None else args.name
        raise UserError(f"data.task.name={value} must be one of {known}")
    cls = TASKS[args.name]
    own = {f.name for f in fields(cls)}
    given = args.given()
    for option in sorted(given.keys() - own):
        raise UserError(
            f"data.task.{option}={given[option]} is no option of data.task.name={args.name}, "
            f"which has {', '.join(sorted(own))}"
        )
    return cls(**given)


def options_of(task: Task) -> dict[str, Any]:
    """Return all options of a task, with its defaults."""
    return {"name": task.name} | asdict(task)
