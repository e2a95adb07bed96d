"""Solvers in plain Python: the answers of one example, recomputed from its tokens alone.

`CASES` has options of each task, small ones first. `solve` returns {position: answer}. The places
of the questions are given: in MQAR a random token may be a key that is not asked for.
"""

from __future__ import annotations

from typing import Any

CASES: dict[str, list[dict[str, Any]]] = {
    "state_tracking": [
        {"n": 2, "n_pointers": 2, "n_addresses": 3, "n_swaps": 1},
        {"n": 5, "n_addresses": 5},
        {"n": 8, "n_swaps": 0},
        {},
        {"n": 64, "n_swaps": 3, "n_pointers": 9},
        {"n": 6, "answers": "all"},
        {"n": 7, "answers": "all", "n_pointers": 2, "random_addresses": False},
    ],
    "mqar": [
        {"num_kv_pairs": 1, "input_seq_len": 4, "vocab_size": 12},
        {"num_kv_pairs": 9, "input_seq_len": 36, "vocab_size": 20, "power_a": 1.0},
        {"random_non_queries": False},
        {},
    ],
    "permutation": [
        {"n": 3, "group": "S3"},
        {"n": 20, "group": "S4", "answers": "last"},
        {"group": "Z60"},
        {"group": "S5"},
        {},
    ],
    "copy": [{"n": 6, "vocab_size": 2}, {}],
    "needle": [
        {"input_seq_len": 5, "vocab_size": 10},
        {"input_seq_len": 35, "num_needle_k": 4, "num_needle_q": 3, "needle_len": 3},
        {"num_needle_k": 8, "vocab_size": 8},
        {},
    ],
}
ALL = [(name, options) for name, cases in CASES.items() for options in cases]


def solve(task: Any, tokens: list[int], asked: list[int]) -> dict[int, int]:
    return SOLVERS[task.name](task, tokens, asked)


def state_tracking(task: Any, tokens: list[int], asked: list[int]) -> dict[int, int]:
    swap, query, pointers = 2, 3, range(4, 4 + task.n_pointers)
    array, place, i = {}, {}, 0
    while tokens[i] not in pointers:
        address, bit = tokens[i : i + 2]
        assert address >= pointers.stop and bit in (0, 1) and address not in array
        array[address], i = bit, i + 2
    assert list(array) == sorted(array) and len(array) == task.n
    first = range(pointers.stop, pointers.stop + task.n)
    assert task.random_addresses or list(array) == list(first)
    answers = {}
    while tokens[i] in pointers:
        pointer, address = tokens[i : i + 2]
        assert address in array and address not in place.values()
        place[pointer], answers[i + 1], i = address, array[address], i + 2
    assert list(place) == list(pointers)
    n_swaps = 0
    while tokens[i] == swap:
        p, q = tokens[i + 1 : i + 3]
        assert p != q
        place[p], place[q], n_swaps = place[q], place[p], n_swaps + 1
        answers[i + 2], i = array[place[p]], i + 3
    assert n_swaps == (task.n if task.n_swaps is None else task.n_swaps)
    assert tokens[i] == query and len(tokens) == i + 2
    answers = answers if task.answers == "all" else {}
    return answers | {i + 1: array[place[tokens[i + 1]]]}


def mqar(task: Any, tokens: list[int], asked: list[int]) -> dict[int, int]:
    n, half = task.num_kv_pairs, task.vocab_size // 2
    value_of = {tokens[i]: tokens[i + 1] for i in range(0, 2 * n, 2)}
    assert all(0 < k < half <= v for k, v in value_of.items())
    assert len(value_of) == len(set(value_of.values())) == n
    assert sorted(tokens[i] for i in asked) == sorted(value_of)
    assert all(i >= 2 * n and i % 2 == 0 for i in asked)
    if not task.random_non_queries:
        assert not any(tokens[i] for i in range(2 * n, len(tokens)) if i not in asked)
    return {i: value_of[tokens[i]] for i in asked}


def permutation(task: Any, tokens: list[int], asked: list[int]) -> dict[int, int]:
    degree = int(task.group[1:])
    if task.group[0] == "Z":
        answers = [sum(tokens[: i + 1]) % degree for i in range(len(tokens))]
    else:
        group = [p for p in arrangements(list(range(degree))) if task.group[0] == "S" or is_even(p)]
        place, answers = list(range(degree)), []
        for token in tokens:
            place = [group[token][x] for x in place]
            answers.append(group.index(place))
    assert asked == (list(range(task.n)) if task.answers == "all" else [task.n - 1])
    return {i: answers[i] for i in asked}


def arrangements(items: list[int]) -> list[list[int]]:
    if not items:
        return [[]]
    return [[x, *rest] for x in items for rest in arrangements([y for y in items if y != x])]


def is_even(p: list[int]) -> bool:
    n_cycles, seen = 0, set()
    for start in p:
        n_cycles += start not in seen
        while start not in seen:
            seen.add(start)
            start = p[start]
    return (len(p) - n_cycles) % 2 == 0


def copy(task: Any, tokens: list[int], asked: list[int]) -> dict[int, int]:
    assert tokens.index(task.vocab_size) == task.n and tokens[task.n + 1 :] == tokens[: task.n - 1]
    return {task.n + i: tokens[i] for i in range(task.n)}


def needle(task: Any, tokens: list[int], asked: list[int]) -> dict[int, int]:
    marker, query, n = task.vocab_size, task.vocab_size + 1, task.needle_len
    value_of, answers, keys = {}, {}, []
    for i, token in enumerate(tokens):
        if token == marker:
            assert tokens[i + 1] not in value_of and marker not in tokens[i + 1 : i + 2 + n]
            value_of[tokens[i + 1]] = tokens[i + 2 : i + 2 + n]
        elif token == query:
            keys.append(tokens[i + 1])
            answers |= {i + 1 + j: answer for j, answer in enumerate(value_of[tokens[i + 1]])}
            assert tokens[i + 2 : i + 1 + n] == value_of[tokens[i + 1]][:-1]
    assert len(value_of) == task.num_needle_k and len(set(keys)) == len(keys) == task.num_needle_q
    return answers


SOLVERS = {f.__name__: f for f in (state_tracking, mqar, permutation, copy, needle)}
