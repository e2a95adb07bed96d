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
        assert found and found == solve(task, row, list(found))


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
        ("state_tracking", {"answers": "first"}, "answers=first"),
        ("mqar", {"num_kv_pairs": 17}, "num_kv_pairs=17"),
        ("mqar", {"num_kv_pairs": 0}, "num_kv_pairs"),
        ("mqar", {"num_kv_pairs": 8, "vocab_size": 17}, "num_kv_pairs=8"),
        ("mqar", {"input_seq_len": 63}, "input_seq_len"),
        ("mqar", {"power_a": 0.0}, "power_a"),
        ("mqar", {"group": "A5"}, "group"),
        ("permutation", {"group": "A7"}, "group=A7"),
        ("permutation", {"group": "Z0"}, "group=Z0"),
        ("permutation", {"answers": "first"}, "answers"),
        ("permutation", {"n": 0}, "n=0"),
        ("copy", {"n": 0}, "n=0"),
        ("copy", {"vocab_size": 1}, "vocab_size"),
        ("needle", {"needle_len": 64}, "input_seq_len=128"),
        ("needle", {"needle_len": 0}, "needle_len"),
        ("needle", {"num_needle_k": 65, "input_seq_len": 999}, "num_needle_k"),
        ("needle", {"num_needle_q": 2}, "num_needle_q"),
    ],
)
def test_impossible_tasks_are_refused(name, options, option):
    with pytest.raises(UserError, match=f"data.task.{option}"):
        make(name, options)


def test_options_of_a_task_build_it_again():
    for name, options in ALL:
        task = make(name, options)
        assert build_task(TaskArgs(**options_of(task))) == task


# ---- shortcuts


def frequencies(values):
    return np.unique(values, return_counts=True)[1] / len(values)


@pytest.mark.parametrize("name", TASKS)
def test_no_answer_is_more_frequent_than_others(name):
    options = {"vocab_size": 16, "input_seq_len": 16, "num_kv_pairs": 4} if name == "mqar" else {}
    task = make(name, options)
    targets = examples(task, 4000)[..., 1]
    last = np.array([row[row != NO_TARGET][-1] for row in targets])
    n_answers = {"state_tracking": 2, "mqar": 8, "permutation": 60, "copy": 26, "needle": 64}[name]
    found = frequencies(last)
    spread = np.sqrt((1 - 1 / n_answers) / n_answers / len(last))  # of a fair die
    assert len(found) == n_answers and abs(found - 1 / n_answers).max() < 5 * spread


def test_state_tracking_needs_the_swaps_and_the_array():
    task = make("state_tracking", {"n": 8})
    views = examples(task, 4000)
    tokens, answers = views[..., 0], views[:, -1, 1]
    rows = np.arange(len(tokens))
    addresses, bits = tokens[:, 0:16:2], tokens[:, 1:16:2]
    starts, asked = tokens[:, 17:26:2], tokens[:, -1] - 4
    first = bits[addresses == starts[rows, asked][:, None]]
    bits_of_pointers = bits[(addresses[:, None] == starts[..., None]).any(1)].reshape(-1, 5)
    guesses = {
        "pointers never move": (first, 0.62),  # 1/5 + 4/5 * 1/2 = 0.6
        "majority of the array": ((bits.mean(1) > 0.5), 0.66),
        "majority of the pointers": ((bits_of_pointers.mean(1) > 0.5), 0.71),  # 11/16 = 0.69
        "last bit": (bits[:, -1], 0.59),  # 1/8 + 7/8 * 1/2 = 0.56
    }
    for shortcut, (guess, most) in guesses.items():
        assert (guess == answers).mean() < most, shortcut


def test_mqar_asks_for_keys_in_any_order():
    views = examples(make("mqar", {}), 2000)
    tokens, is_answer = views[..., 0], views[..., 1] != NO_TARGET
    asked = tokens[is_answer].reshape(-1, 8)
    order = (tokens[:, None, 0:16:2] == asked[..., None]).argmax(-1)  # pair of each query
    assert abs(order.mean(0) - 3.5).max() < 0.6  # recent and early pairs at each place
    assert (order[:, :1] == order).mean() < 0.14 and abs((order == 7).mean(0) - 1 / 8).max() < 0.04


def test_small_powers_ask_soon():
    distances = {}
    for power in (0.01, 1.0):
        is_answer = examples(make("mqar", {"power_a": power}), 500)[..., 1] != NO_TARGET
        distances[power] = np.nonzero(is_answer)[1].mean()
    assert distances[0.01] + 5 < distances[1.0] == pytest.approx(16 + 23, abs=1)


def test_every_prefix_of_a_permutation_word_is_open():
    views = examples(make("permutation", {"n": 12}), 4000)
    tokens, products = views[..., 0], views[..., 1]
    for guess in (tokens[:, 1:], products[:, :-1], tokens[:, :-1]):
        assert (guess == products[:, 1:]).mean() < 0.03  # chance is 1/60
    assert frequencies(products[:, 1]).max() < 0.03


def test_needles_and_queries_are_anywhere():
    task = make("needle", {"num_needle_k": 4})
    tokens = examples(task, 2000)[..., 0]
    places = np.nonzero(tokens == 64)[1].reshape(-1, 4)
    assert places.min() == 0 and places.max() == 128 - 2 - 3
    keys = np.take_along_axis(tokens, places + 1, axis=1)
    asked = (keys == tokens[:, -1:]).argmax(1)
    assert abs(frequencies(asked) - 0.25).max() < 0.05
