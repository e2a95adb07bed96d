"""The benchmark of checkpoints times every row, leaves nothing behind, and refuses mistakes."""

from __future__ import annotations

import json

import pytest

from apps.LT2.scripts import benchmark_checkpoint
from lingua.errors import UserError
from tests.LT2.tiny_run import OPTIONS, SMALL

ROWS = {
    "plain write",
    "save",
    "plain read",
    "load",
    "training step",
    "async_save: wait for the copy",
    "async_save: step meanwhile",
    "async_save: added in all",
}


def measured(folder, capsys, *options: str):
    model = {k: v for k, v in (OPTIONS | SMALL).items() if k.startswith(("model.", "data."))}
    given = [f"{name}={'null' if value is None else value}" for name, value in model.items()]
    recipe = "config=apps/LT2/configs/600M/debug.yaml"
    fixed = ["--folder", str(folder), "--repeats", "2", "--steps", "1", recipe]
    benchmark_checkpoint.main([*fixed, *given, *options])
    out = capsys.readouterr().out
    assert all(len(line) <= 100 for line in out.splitlines()[:-1])
    return json.loads(out.splitlines()[-1])


def test_every_row_is_measured_and_the_folder_stays_empty(tmp_path, capsys, monkeypatch):
    steps = []
    clock = benchmark_checkpoint.Benchmark.clock

    def counted(self, action):
        steps.append(self.trainer.state.step)
        return clock(self, action)

    monkeypatch.setattr(benchmark_checkpoint.Benchmark, "clock", counted)
    freed = []
    monkeypatch.setattr(
        benchmark_checkpoint.Trainer, "free_graphs", lambda self: freed.append(self)
    )
    found = measured(tmp_path, capsys)
    assert len(freed) == 1  # else NCCL waits for them
    assert found["seconds"].keys() == ROWS
    for name, (median, low, high) in found["seconds"].items():
        assert low <= median <= high, name
        assert low > 0 or "added" in name
    assert found["bytes"] > 3 * 4 * 32 * 258, "weights and two moments of the embedding"
    assert steps[-1] >= 6, "2 steps to warm up, a usual one and one during a save per repeat"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, name",
    [
        ("--folder=/no/such", "--folder"),
        ("--repeats=0", "--repeats"),
        ("config=other.yaml", "config=FILE.yaml"),
        ("model.n_heads=7", "model.n_heads=7"),
    ],
)
def test_mistakes_are_refused_in_one_line(tmp_path, capsys, option, name):
    with pytest.raises(UserError, match=name) as caught:
        measured(tmp_path, capsys, option)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
