"""The profiler records the configured iterations, and nothing when it is off."""

import gzip
import json
import os

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from lingua.errors import UserError
from lingua.profiling import ProfilerArgs, maybe_run_profiler


def train(dump_dir, config: ProfilerArgs, n_steps: int) -> None:
    model = nn.Linear(4, 4)
    with maybe_run_profiler(dump_dir, model, config) as profiler:
        for i in range(n_steps):
            with record_function(f"iteration-{i}"):
                model(torch.ones(2, 4)).sum().backward()
            profiler.step()


def traced_iterations(path) -> list[int]:
    with gzip.open(path, "rt") as f:
        events = json.load(f)["traceEvents"]
    names = {e["name"] for e in events if str(e.get("name", "")).startswith("iteration-")}
    return sorted(int(name.split("-")[1]) for name in names)


def trace_only(start: int, steps: int) -> ProfilerArgs:
    return ProfilerArgs(run=True, mem_steps=0, profile_warmup=start, profile_steps=steps)


@pytest.mark.parametrize(
    "start, steps, n_steps, want",
    [(2, 2, 6, [2, 3]), (0, 1, 3, [0]), (2, 3, 4, [2, 3])],  # the last run ends inside the window
)
def test_trace_holds_the_window(tmp_path, start, steps, n_steps, want):
    train(tmp_path, trace_only(start, steps), n_steps)
    (file,) = os.listdir(tmp_path / "profiling")
    assert file == f"trace_rank00000_iter{start:06d}.json.gz"
    assert traced_iterations(tmp_path / "profiling" / file) == want


def test_files_are_named_by_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "10")
    train(tmp_path, trace_only(0, 1), 2)
    assert os.listdir(tmp_path / "profiling") == ["trace_rank00009_iter000000.json.gz"]


@pytest.mark.parametrize("config", [ProfilerArgs(), trace_only(10, 1), trace_only(0, 0)])
def test_nothing_is_written_outside_the_window(tmp_path, config):
    train(tmp_path, config, 3)
    assert not [f for _, _, files in os.walk(tmp_path) for f in files]
    assert config.run or not os.listdir(tmp_path)


def test_run_that_ends_before_its_window_warns(tmp_path, caplog):
    train(tmp_path, trace_only(3, 1), 3)
    assert not caplog.records
    train(tmp_path, trace_only(10, 1), 3)
    (record,) = caplog.records
    assert "profiling.profile_warmup=10: not reached" in record.getMessage()


def test_window_is_written_after_an_error(tmp_path):
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        maybe_run_profiler(tmp_path, nn.Linear(2, 2), trace_only(0, 5)),
    ):
        torch.ones(2).sum()
        raise RuntimeError("out of memory")
    assert len(os.listdir(tmp_path / "profiling")) == 1


def test_overlapping_windows_are_an_error():
    with pytest.raises(UserError, match="profiling.profile_warmup=101.*use 102"):
        ProfilerArgs(run=True, profile_warmup=101)
    with pytest.raises(UserError, match="must not overlap"):
        ProfilerArgs(run=True, mem_warmup=103)
    with pytest.raises(UserError, match="profiling.mem_steps=-1"):
        ProfilerArgs(mem_steps=-1)
    ProfilerArgs(run=True)
    ProfilerArgs(run=False, profile_warmup=101)
    ProfilerArgs(run=True, profile_warmup=98)
    ProfilerArgs(run=True, mem_warmup=103, mem_steps=0)
