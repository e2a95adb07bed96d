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
