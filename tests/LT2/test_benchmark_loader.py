"""The benchmark of the data loader measures both kinds and refuses bad options in one line."""

from __future__ import annotations

import json

import pytest

from apps.LT2.scripts import benchmark_loader
from lingua.errors import UserError
from tests.setup_scripts import load_script


def options_of(data) -> list[str]:
    return [
        f"data.root_dir={data}",
        "data.sources={text: 1}",
        "data.tokenizer.name=bytes",
        "data.seq_len=16",
        "data.prefetch_size=2",
        "seed=1",
    ]


def measured(data, capsys, *options: str) -> dict[str, list[float]]:
    benchmark_loader.main([*options_of(data), "--batches", "2", "--repeats", "2", *options])
    return json.loads(capsys.readouterr().out.splitlines()[-1])["tokens_per_s"]


def test_token_files_are_measured_if_they_exist(data, capsys):
    assert set(measured(data, capsys)) == {"lines"}
    load_script("tokenize_data").main(options_of(data))
    found = measured(data, capsys)
    assert set(found) == {"lines", "token files"}
    assert all(low <= median <= high and low > 0 for median, low, high in found.values())


@pytest.mark.parametrize(
    "option, message",
    [
        ("data.root_dir=/no/such", "^data.root_dir=/no/such: no such folder"),
        ("model.dim=64", "^model.dim=64: "),
        ("--repeats=0", "--repeats 0 must be at least 1"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(data, capsys, option, message):
    with pytest.raises(UserError, match=message):
        measured(data, capsys, option)
    assert capsys.readouterr().out == ""
