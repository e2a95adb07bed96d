"""What the server that test ranks fork from imports, out of garbage collection.

A collection would copy the memory of the imported objects into every rank.
"""

# ruff: noqa: E402
import gc

gc.disable()  # imports leave no garbage

import omegaconf  # noqa: F401, read at parse_args
import pytest  # noqa: F401
import torch._dynamo  # noqa: F401, the first optimizer step imports it
import torch.distributed.checkpoint  # noqa: F401
import torch.distributed.fsdp  # noqa: F401

import apps.LT2.train  # noqa: F401

gc.freeze()
gc.enable()
