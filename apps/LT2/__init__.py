import os
import sys

import lingua.parallel.torchrun  # noqa: F401  before torch, which takes seconds to import
from lingua.config.stand_in import replace_torch_for_help

# Waiting OpenMP threads sleep instead of spinning. On cores that other programs use, spinning makes
# training and decoding many times slower. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# `python -m apps.LT2.train --help`; lm_eval prints the harness's own help, which needs torch
if sys.argv[0] == "-m" and "apps.LT2.lm_eval" not in sys.orig_argv:
    replace_torch_for_help(sys.argv)
