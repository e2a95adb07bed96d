"""Tests of our Triton kernels in Triton's interpreter, on a CPU.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted

Triton reads the variable when a kernel is defined, so tests/LT2/kernel/test_interpreted.py runs
these tests in a separate process.
"""

from __future__ import annotations

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
