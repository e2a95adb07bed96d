"""Solvers in plain Python: the answers of one example, recomputed from its tokens alone.

`CASES` has the options of each task, small ones first. `solve` returns {position: answer}.
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
    ],
}
ALL = [(name, options) for name, cases in CASES.items() for options in cases]


def solve(task: Any, tokens: list[int]) -> dict[int, int]:
    return {"state_tracking": state_tracking}[task.name](task, tokens)


def state_tracking(task: Any, tokens: list[int]) -> dict[int, int]:
    swap, query, pointers = 2, 3, range(4, 4 + task.n_pointers)
    array, place, i = {}, {}, 0
    while tokens[i] not in pointers:
        address, bit = tokens[i : i + 2]
        assert address >= pointers.stop and bit in (0, 1) and address not in array
        array[address], i = bit, i + 2
    assert list(array) == sorted(array) and len(array) == task.n
    while tokens[i] in pointers:
        pointer, address = tokens[i : i + 2]
        assert address in array and address not in place.values()
        place[pointer], i = address, i + 2
    assert list(place) == list(pointers)
    n_swaps = 0
    while tokens[i] == swap:
        p, q = tokens[i + 1 : i + 3]
        assert p != q
        place[p], place[q], i, n_swaps = place[q], place[p], i + 3, n_swaps + 1
    assert n_swaps == (task.n if task.n_swaps is None else task.n_swaps)
    assert tokens[i] == query and len(tokens) == i + 2
    return {i + 1: array[place[tokens[i + 1]]]}
