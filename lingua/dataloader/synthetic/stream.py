"""The batches of a synthetic task on one data-parallel rank.

Batch i of rank r of R has the examples from number (i * R + r) * batch_size. So ranks share none,
and no number repeats. The state counts the batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypedDict

from lingua.dataloader.synthetic.args import TaskArgs, build_task

if TYPE_CHECKING:
    import numpy as np

MIN_EXAMPLES = 256  # made together: a call takes as long for 1 example as for 50


class TaskState(TypedDict):
    task: dict[str, Any]  # all options
    seed: int
    batch_size: int
    rank: int
    world_size: int
    n_batches: int  # already yielded


def task_batches(state: TaskState) -> Iterator[tuple[np.ndarray, TaskState]]:
    """Yield batches (B, seq_len, 2) int64 of tokens and targets, each with the state after it."""
    import numpy as np

    task, size = build_task(TaskArgs(**state["task"])), state["batch_size"]
    n_ahead = max(1, MIN_EXAMPLES // size)
    while True:
        numbers = np.arange(state["n_batches"], state["n_batches"] + n_ahead)
        first = (numbers * state["world_size"] + state["rank"]) * size
        indices = (first[:, None] + np.arange(size)).ravel()
        views = task.examples(state["seed"], indices, held_out=False)
        for batch in views.reshape(n_ahead, size, task.seq_len, 2):
            state = TaskState(**{**state, "n_batches": state["n_batches"] + 1})
            yield batch, state


def held_out_examples(args: TaskArgs, seed: int, n: int) -> np.ndarray:
    """Return `n` examples that training never draws, (n, seq_len, 2) int64."""
    import numpy as np

    return build_task(args).examples(seed, np.arange(n), held_out=True)
