"""The log line of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apps.LT2.loops import parse_loop_plan
from apps.LT2.training.progress import Progress


@pytest.mark.parametrize(
    "tokens_per_s, shown",
    [
        (0.4, "0"),
        (999.4, "999"),
        (999.6, "1k"),
        (1234, "1.23k"),
        (999_400, "999k"),
        (999_700, "1M"),
        (12_345_678, "12.3M"),
        (999_700_000, "1G"),
    ],
)
def test_the_line_has_three_digits_and_a_unit(tokens_per_s, shown):
    distributed = SimpleNamespace(model_dtype="fp32")
    args = SimpleNamespace(steps=10, distributed=distributed)
    model = SimpleNamespace(loop_plan=parse_loop_plan(1, None, None, 0))
    trainer: Any = SimpleNamespace(
        args=args, device=torch.device("cpu"), model=model, tokens_per_step=7, graphs=None
    )
    progress = Progress(trainer, flops_per_token={1: 1})
    progress._seconds_per_flop = 20.0 / 7
    record = {
        "global_step": 4,
        "loss/out": 2.5,
        "optim/lr": 3e-4,
        "optim/grad_norm": 1.0,
        "speed/tokens_per_s": tokens_per_s,
        "speed/curr_iter_time": 20.0,
    }
    line = progress.line(record)
    assert f"  {shown} tokens/s  " in line
    assert line.startswith("step 4/10  loss 2.5000  lr 3.00e-04  grad 1.000")
    assert line.endswith("eta 0:02:00")


def test_the_time_left_follows_the_loops_of_the_steps_left():
    args = SimpleNamespace(steps=10, distributed=SimpleNamespace(model_dtype="fp32"))
    model = SimpleNamespace(loop_plan=parse_loop_plan(4, "1@0, 4@0.5", None, 0))
    trainer: Any = SimpleNamespace(
        args=args, device=torch.device("cpu"), model=model, tokens_per_step=7, graphs=None
    )
    progress = Progress(trainer, flops_per_token={1: 10, 4: 40})
    progress._seconds_per_flop = 0.1
    record = {"global_step": 4, "loss/out": 2.5, "optim/lr": 3e-4, "optim/grad_norm": 1.0}
    record |= {"speed/tokens_per_s": 1.0, "optim/loops": 1.25}
    line = progress.line(record)
    assert line.endswith("loops 1.25  eta 0:02:27")  # 7 * (1 * 10 + 5 * 40) FLOPs
