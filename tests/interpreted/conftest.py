"""Our Triton kernels in Triton's interpreter, on a CPU: what they compute, not how fast.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted

Triton looks at the variable when a kernel is defined, so these tests have a process of their own:
tests/LT2/kernel/test_interpreted.py starts it.
"""

from __future__ import annotations

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
