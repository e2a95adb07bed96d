"""What several files start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.LT2.tiny_run import write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A corpus to train on, for all runs of a file."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
