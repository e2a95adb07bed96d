"""Short lists of kernel configurations: which are tried, and what happens if none fits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from apps.LT2.inference.load import check_kernels
from apps.LT2.kernel import tuning
from apps.LT2.scripts import tune_kernels
from lingua.errors import UserError
from tests.LT2.tiny import tiny_args

pytest.importorskip("triton")
from triton import Config  # noqa: E402
from triton.runtime.autotuner import Autotuner, Heuristics  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

SIZES = (16, 32, 64, 128)


def entry(size: int, warps: int = 4) -> tuning.Entry:
    return {"SIZE": size, "num_warps": warps, "num_stages": 3}


class Kernel:
    """A kernel with a time for each SIZE; a SIZE without one doesn't fit the GPU."""

    def __init__(self, times: dict[int, float]):
        self.times, self.compiled, self.ran = times, [], []
        self.fn: Any = lambda x: None
        self.fn.__name__ = "toy_kernel"

    def warmup(self, *, x: int, grid: tuple, SIZE: int, **options: int) -> None:  # noqa: N803
        self.compiled.append(SIZE)

    def run(self, *, x: int, SIZE: int, **options: Any) -> int:  # noqa: N803
        if SIZE not in self.times:
            raise OutOfResources(SIZE, 64, "shared memory")
        self.ran.append(SIZE)
        return SIZE

    def tuner(self, **options: Any) -> Any:
        def bench(call: Any, quantiles: Any) -> list[float]:
            call()
            return [self.times[self.ran[-1]]] * 3

        configs = [Config({"SIZE": size}) for size in SIZES]
        return Autotuner(self, ["x"], configs, ["x"], None, None, do_bench=bench, **options)


def call(tuner: Any) -> int:
    return tuner.run(x=1, grid=(1,), warmup=False)


@pytest.mark.parametrize(
    "sizes, tried", [((64, 32), [64, 32]), ((64,), [64]), ((), [*SIZES]), ((7,), [*SIZES])]
)
def test_only_the_list_is_compiled_and_timed(sizes, tried):
    kernel = Kernel({16: 1.0, 32: 2.0, 64: 3.0, 128: 4.0})
    tuner = kernel.tuner()
    tuning.ShortList(tuner, [entry(size) for size in sizes])
    assert call(tuner) == min(tried)
    assert kernel.compiled == (tried if len(tried) > 1 else [])
    assert kernel.ran == [*tried, min(tried)]


def test_a_list_that_does_not_fit_falls_back_to_all():
    kernel = Kernel({16: 2.0, 32: 1.0})
    tuner = kernel.tuner()
    tuning.ShortList(tuner, [entry(64), entry(128)])
    assert [call(tuner), call(tuner)] == [32, 32]


def test_a_kernel_that_fits_nowhere_is_an_error():
    tuner = Kernel({}).tuner()
    tuning.ShortList(tuner, [entry(64)])
    with pytest.raises(OutOfResources):
        call(tuner)


def test_configurations_that_fla_excludes_are_not_tried():
    """fla excludes configurations that compute wrong results, from the list of all."""
    kernel = Kernel(dict.fromkeys(SIZES, 1.0))
    exclude = {"early_config_prune": lambda configs, nargs, **_: configs[1:]}
    tuner = kernel.tuner(prune_configs_by=exclude)
    tuning.ShortList(tuner, [entry(16), entry(32)])
    assert call(tuner) == 32
    assert set(kernel.ran) == {32}


# ---- which list


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lists = {
        "A 1": {"toy_kernel": {"best": [entry(16)], "others": [entry(32)]}},
        "B 2": {"toy_kernel": {"best": [entry(64)], "others": [entry(16)]}, "b": {}},
    }
    lists["B 2"]["b"] = {"best": [entry(128)], "others": []}
    for gpu, kernels in lists.items():
        tune_kernels.write_lists(tuning.file_of_gpu(gpu, tmp_path), gpu, kernels)
    return tmp_path


def test_a_gpu_uses_its_own_list_and_another_one_all_lists(folder):
    own = tuning.read_lists("A 1", folder)
    assert own == {"toy_kernel": [entry(16)], "b": [entry(128)]}
    other = tuning.read_lists("C", folder)
    assert other["toy_kernel"] == [entry(16), entry(32), entry(64)]


@pytest.fixture
def gpu(monkeypatch, folder) -> Any:
    """Simulate GPU "A 1" with a module of fla; returns its kernel."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A 1")
    monkeypatch.setattr(tuning.read_lists, "__defaults__", (folder,))
    monkeypatch.delenv("FLA_CACHE_MODE", raising=False)
    tuning.lists_of_this_gpu.cache_clear()
    kernel, module = Kernel(dict.fromkeys(SIZES, 1.0)), ModuleType("fla.toy")
    vars(module)["toy_kernel"] = Heuristics(kernel.tuner(), ["x"], {})
    monkeypatch.setitem(sys.modules, "fla.toy", module)
    yield SimpleNamespace(kernel=kernel, tuner=vars(module)["toy_kernel"].fn)
    tuning.lists_of_this_gpu.cache_clear()


@pytest.mark.parametrize(
    "variables, tried",
    [
        ({}, {16}),
        ({"LT2_TUNE": "short"}, {16}),
        ({"LT2_TUNE": "full"}, {*SIZES}),
        ({"FLA_CACHE_MODE": "strict"}, {*SIZES}),
    ],
)
def test_the_environment_chooses_the_search(monkeypatch, gpu, variables, tried):
    monkeypatch.delenv("LT2_TUNE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tuning.limit_tuning()
    tuning.limit_tuning()
    call(gpu.tuner)
    assert set(gpu.kernel.ran) == tried


def test_an_unknown_search_is_a_user_error(monkeypatch):
    monkeypatch.setenv("LT2_TUNE", "long")
    with pytest.raises(UserError, match="LT2_TUNE=long"):
        check_kernels(tiny_args("gdn", 1), "cpu")


def test_every_list_in_the_package_can_be_read():
    paths = list(tuning.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        gpu = json.loads(path.read_text(encoding="utf-8"))["gpu"]
        assert tuning.file_of_gpu(gpu) == path
        assert all(tuning.read_lists(gpu).values())


# ---- from a search to a list


def write_search(folder: Path, kernel: str, key: list, times: dict[int, float]) -> None:
    timings = [[vars(Config({"SIZE": size})), [ms] * 3] for size, ms in times.items()]
    folder.mkdir(parents=True)
    search = {"key": key, "configs_timings": timings}
    folder.joinpath(f"{kernel}.autotune.json").write_text(json.dumps(search))


def test_a_list_covers_every_shape(tmp_path, capsys):
    """Each shape needs its own; 128 fits nowhere; the shorter search of a shape is not used."""
    cache, out, inf = tmp_path / "cache", tmp_path / "out", float("inf")
    write_search(cache / ".a", "toy", [1], {16: 1.0, 32: 1.02, 64: 5.0, 128: inf})
    write_search(cache / "b", "toy", [2], {16: 9.0, 32: 4.0, 64: 2.0, 128: inf})
    write_search(cache / "c", "toy", [2], {16: 1.0})
    write_search(cache / "d", "once", [1], {16: 1.0, 32: 1.08, 64: 1.5})
    argv = [str(cache), "--gpu", "NVIDIA X-1", "--out", str(out)]
    out.mkdir()
    tune_kernels.main(argv)
    lists = json.loads((out / "NVIDIA_X_1.json").read_text())
    assert lists["gpu"] == "NVIDIA X-1"
    toy, once = (lists["kernels"][name] for name in ("toy", "once"))
    assert {e["SIZE"] for e in toy["best"]} == {64, 32} or {e["SIZE"] for e in toy["best"]} == {
        64,
        16,
    }
    assert 128 not in {e["SIZE"] for e in toy["others"]}
    assert once == {"best": [entry(16), entry(32)], "others": [entry(64)]}
    # A later search keeps what covers other shapes and kernels.
    write_search(tmp_path / "later/a", "once", [1], {64: 1.0})
    tune_kernels.main([str(tmp_path / "later"), *argv[1:]])
    kernels = json.loads((out / "NVIDIA_X_1.json").read_text())["kernels"]
    assert kernels["toy"] == toy
    assert kernels["once"] == {"best": [entry(64), entry(16), entry(32)], "others": []}


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_without_a_search_is_a_user_error(tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "missing"
    with pytest.raises(UserError, match=str(folder)):
        tune_kernels.main([str(folder), "--gpu", "X"])


def test_the_name_of_the_gpu_is_needed_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--gpu"):
        tune_kernels.main([str(tmp_path)])
