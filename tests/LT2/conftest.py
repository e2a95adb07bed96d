"""Fixtures of several test files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from apps.LT2.transformer import LoopedTransformer
from tests.LT2.looped_models import MODELS, make
from tests.LT2.mixer_cases import CASES, Case
from tests.LT2.tiny_run import write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A corpus for all runs of a file."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request) -> LoopedTransformer:
    """A looped model of every kind."""
    return make(**request.param)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Iterator[Case]:
    """A mixer of every kind; its dtype is the default dtype."""
    torch.set_default_dtype(request.param.dtype)
    yield request.param
    torch.set_default_dtype(torch.float32)
