"""Tests of our Triton kernels in Triton's interpreter, on a CPU.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted

Triton reads the variable when a kernel is defined, so tests/LT2/kernel/test_interpreted.py runs
these tests in a separate process.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        """Call a kernel's function, without patching triton.language for its module again.

        Triton's own form does in every call what the launch has done: over 40% of the time.
        """
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call

    # Without `debug` nothing reads the checks for overflow, a fifth of the time.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)

    get_np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def cached_np_dtype(tt_dtype):
        """Return numpy's dtype of a Triton type. Triton's own form makes a table in every call."""
        if tt_dtype.name not in np_dtypes:
            np_dtypes[tt_dtype.name] = get_np_dtype(tt_dtype)
        return np_dtypes[tt_dtype.name]

    interpreter._get_np_dtype = cached_np_dtype
