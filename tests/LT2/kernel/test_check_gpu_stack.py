"""The start-up check of the GPU packages and its advice."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from apps.LT2.inference.load import check_kernels
from apps.LT2.kernel import check_gpu_stack
from apps.LT2.mixers import MIXERS
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """Simulate a machine with a Hopper GPU, fla and a Triton of the given version."""

    def build(*, triton="3.7.1", capability=(9, 0), missing=()):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        find = lambda name: None if name in missing else object()  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", find)
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))

    return build


def test_nothing_to_check_without_cuda(machine, monkeypatch):
    machine(triton="3.6.0", missing=("fla", "triton"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_gpu_stack()


@pytest.mark.parametrize("version", ["3.7.1", "3.7.1+gitabc123", "3.8.0", "4.0", "3.10.0"])
def test_new_triton_passes_on_hopper(machine, version):
    machine(triton=version)
    check_gpu_stack()


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0"])
def test_old_triton_is_refused_on_hopper_only(machine, version):
    machine(triton=version)
    with pytest.raises(UserError, match=rf"{version}.*pip install 'triton>=3\.7\.1'"):
        check_gpu_stack()
    machine(triton=version, capability=(8, 0))
    check_gpu_stack()


@pytest.mark.parametrize("package", ["fla", "triton"])
def test_missing_package_names_the_extra(machine, package):
    machine(missing=(package,))
    with pytest.raises(UserError, match=rf"{package}.*pip install -e '\.\[gpu\]'"):
        check_gpu_stack()


@pytest.mark.parametrize("mixer", MIXERS)
def test_only_mixers_on_fla_need_it(machine, mixer):
    """full, window, nsa and dsa run on torch and on our Triton kernels."""
    machine(missing=("fla",))
    args = LoopedTransformerArgs(mixer=mixer)
    if mixer in ("full", "window", "nsa", "dsa"):
        check_kernels(args, "cuda")
    else:
        with pytest.raises(UserError, match="package fla"):
            check_kernels(args, "cuda")
    check_kernels(args, "cpu")
