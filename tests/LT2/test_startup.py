"""Commands start without modules that they may not need."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import apps.LT2.train, apps.LT2.eval, apps.LT2.generate
from apps.LT2.transformer import LoopedTransformerArgs, build_on_meta
build_on_meta(LoopedTransformerArgs(dim=32, n_layers=1, n_heads=2, vocab_size=16))
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""


def test_the_compiler_and_plots_are_imported_late():
    late = ("torch._dynamo", "torch._inductor", "matplotlib", "transformers", "lm_eval", "pandas")
    command = [sys.executable, "-c", PROGRAM, *late]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
