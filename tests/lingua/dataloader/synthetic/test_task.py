"""Every task: right answers, a sharp split, and examples that depend on (seed, number) alone."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")

from lingua.dataloader.packing import NO_TARGET  # noqa: E402
from lingua.dataloader.synthetic.args import TASKS, TaskArgs, build_task, options_of  # noqa: E402
from lingua.dataloader.synthetic.task import HELD_OUT, is_held_out  # noqa: E402
from lingua.errors import UserError  # noqa: E402
from tests.lingua.dataloader.synthetic.naive import ALL, CASES, solve  # noqa: E402


def make(name, options):
    return build_task(TaskArgs(name=name, **options))


def examples(task, n, seed=0, held_out=False, start=0):
    return task.examples(seed, np.arange(start, start + n), held_out=held_out)


def as_set(views):
    return {tuple(row) for row in views[..., 0].tolist()}


def test_every_task_has_a_solver():
    assert CASES.keys() == TASKS.keys()


@pytest.mark.parametrize("name, options", ALL)
@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_right(name, options, held_out):
    task = make(name, options)
    views = examples(task, 50, seed=3, held_out=held_out)
    assert views.shape == (50, task.seq_len, 2) and views.dtype == np.int64
    tokens, targets = views[..., 0], views[..., 1]
    assert tokens.min() >= 0 and max(tokens.max(), targets.max()) < task.n_tokens
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        found = {i: answer for i, answer in enumerate(answers) if answer != NO_TARGET}
        assert found and found == solve(task, row)


@pytest.mark.parametrize("name, options", ALL)
def test_an_example_depends_on_seed_and_number_alone(name, options):
    task = make(name, options)
    views = examples(task, 40, seed=5)
    numbers = [7, 39, 0, 7]
    assert (task.examples(5, np.array(numbers), held_out=False) == views[numbers]).all()
    assert (examples(task, 10, seed=5, start=30) == views[30:]).all()
    assert (examples(task, 40, seed=6) != views).any()
    assert (examples(task, 40, seed=5, held_out=True) != views).any()


@pytest.mark.parametrize("name, options", ALL)
def test_training_and_validation_share_no_example(name, options):
    task = make(name, options)
    trained = as_set(examples(task, 600, seed=1)) | as_set(examples(task, 600, seed=2))
    assert not trained & as_set(examples(task, 200, seed=1, held_out=True))


@pytest.mark.parametrize("name", TASKS)
def test_the_split_takes_one_example_in_so_many(name):
    task = make(name, {})
    tokens = examples(task, 3000)[..., 0]
    assert not is_held_out(tokens).any()
    tokens[:, 0] = np.arange(len(tokens))  # other examples
    assert is_held_out(tokens).mean() == pytest.approx(1 / HELD_OUT, rel=0.3)


def test_options_of_other_tasks_are_refused():
    with pytest.raises(UserError, match="data.task.name=foo"):
        make("foo", {})
    with pytest.raises(UserError, match="data.task.name=null"):
        make(None, {"n": 3})


@pytest.mark.parametrize(
    "name, options, option",
    [
        ("state_tracking", {"n": 300}, "n=300"),
        ("state_tracking", {"n": 4}, "n=4"),
        ("state_tracking", {"n_pointers": 1}, "n_pointers"),
        ("state_tracking", {"n_swaps": -1}, "n_swaps"),
    ],
)
def test_impossible_tasks_are_refused(name, options, option):
    with pytest.raises(UserError, match=f"data.task.{option}"):
        make(name, options)


def test_options_of_a_task_build_it_again():
    for name, options in ALL:
        task = make(name, options)
        assert build_task(TaskArgs(**options_of(task))) == task
