"""The batches of a task: disjoint ranks, exact resumes, also with another number of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import pytest

np = pytest.importorskip("numpy")

from lingua.data import (  # noqa: E402
    build_dataloader_from_args,
    init_dataloader_state_from_args,
    validate_data_args,
)
from lingua.dataloader.args import DataArgs  # noqa: E402
from lingua.dataloader.reshard import reshard_streams  # noqa: E402
from lingua.dataloader.synthetic.args import TaskArgs, build_task  # noqa: E402
from lingua.dataloader.synthetic.stream import held_out_examples  # noqa: E402
from lingua.errors import UserError  # noqa: E402
from tests.lingua.test_data import make_source  # noqa: E402

TASK = TaskArgs(name="state_tracking", n=6, n_addresses=8)
ARGS = DataArgs(batch_size=3, seed=4, load_async=False, task=TASK)


def read(args, state, n):
    with build_dataloader_from_args(args, state) as batches:
        return list(islice(batches, n))


def numbered(n, args=ARGS):
    """The first `n` examples of the whole run."""
    assert args.task is not None
    return build_task(args.task).examples(4, np.arange(n), held_out=False)


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_take_the_examples_in_order_without_a_gap(world_size):
    states = [init_dataloader_state_from_args(ARGS, rank, world_size) for rank in range(world_size)]
    per_rank = [[batch for batch, _ in read(ARGS, state, 100)] for state in states]
    steps = np.stack([np.stack(batches) for batches in per_rank], axis=1)  # step, rank, batch
    assert (steps.reshape(-1, *steps.shape[3:]) == numbered(300 * world_size)).all()


# Blocks have 85 batches.
@pytest.mark.parametrize(
    "n_read, load_async", [*((n, False) for n in (1, 84, 85, 86, 171)), (86, True)]
)
def test_resume_is_exact(n_read, load_async):
    args = replace(ARGS, load_async=load_async)
    taken = read(args, init_dataloader_state_from_args(args, 1, 2), 180)
    state = json.loads(json.dumps(taken[n_read - 1][1]))
    for (batch, after), (wanted, wanted_after) in zip(
        read(args, state, 5), taken[n_read : n_read + 5], strict=True
    ):
        assert (batch == wanted).all() and after == wanted_after


def test_another_number_of_ranks_takes_every_example_once():
    states = [init_dataloader_state_from_args(ARGS, rank, 2) for rank in range(2)]
    taken = [read(ARGS, state, 4) for state in states]
    states = [reshard_streams([t[-1][1] for t in taken], rank, 3) for rank in range(3)]
    got = [batch for t in taken for batch, _ in t]
    got += [batch for state in states for batch, _ in read(ARGS, state, 8)]
    assert sorted(np.concatenate(got).tolist()) == sorted(numbered(96).tolist())


def test_a_changed_task_is_refused_on_resume():
    state = read(ARGS, init_dataloader_state_from_args(ARGS, 0, 1), 1)[0][1]
    for changed, option in (
        (DataArgs(batch_size=3, seed=4, task=replace(TASK, n=7)), "data.task.n is 7"),
        (replace(ARGS, batch_size=4), "data.batch_size"),
        (replace(ARGS, seed=5), "data.seed"),
    ):
        with pytest.raises(UserError, match=option):
            read(changed, state, 1)


def test_a_run_on_text_and_one_on_a_task_do_not_continue_each_other(tmp_path):
    make_source(tmp_path / "web", ["some text"])
    text = DataArgs(str(tmp_path), {"web": 1.0}, batch_size=3, seed=4, load_async=False)
    for args, other in ((text, ARGS), (ARGS, text)):
        with pytest.raises(UserError, match="data.task"):
            read(args, init_dataloader_state_from_args(other, 0, 1), 1)


def test_a_task_sets_the_length_of_rows():
    assert ARGS.seq_len == 2 * 6 + 10 + 18 + 2
    assert replace(ARGS).seq_len == ARGS.seq_len
    validate_data_args(ARGS, 3)
    with pytest.raises(UserError, match="data.seq_len=64"):
        DataArgs(task=TASK, seq_len=64)


@pytest.mark.parametrize("text", [{"sources": {"x": 1.0}}, {"root_dir": "data"}])
def test_a_task_with_text_is_refused(text):
    with pytest.raises(UserError, match=f"data.{next(iter(text))}"):
        DataArgs(task=TASK, **text)


def test_held_out_examples_are_those_of_the_task():
    assert (held_out_examples(TASK, 4, 10)[:5] == held_out_examples(TASK, 4, 5)).all()
