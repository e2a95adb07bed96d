"""What a run can tell beside its record of each step: losses inside a step, and probes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from apps.LT2.batch import Batch
from apps.LT2.diagnostics import probed_pass
from apps.LT2.training.trainer import Trainer, every_n_steps
from lingua.distributed import dist_mean, get_dp_rank_and_degree, run_on_rank_0
from lingua.files.jsonl_log import is_recorded, mend_jsonl
from lingua.metrics import MetricLogger
from lingua.probe import Probe


def log_micro_batches(trainer: Trainer, metrics: MetricLogger, acc_freq: int | None) -> None:
    """With logging.acc_freq, logged steps have a record each acc_freq micro-batches."""
    if acc_freq is None:
        return

    def log(loss: Tensor) -> None:
        state = trainer.state
        is_logged = (state.step + 1) % trainer.args.logging.freq == 0
        if is_logged and state.acc_step and state.acc_step % acc_freq == 0:
            mean = dist_mean(loss).item()
            record = {"global_step": state.step, "acc_step": state.acc_step, "loss/out": mean}
            metrics.log(record)

    trainer.after_micro_batch = log


def probe_now_and_then(trainer: Trainer, metrics: MetricLogger) -> None:
    """With probe_freq, one pass of its own before such a step: statistics of every linear layer,
    and a record of what apps.LT2.diagnostics measures."""
    freq, state = trainer.args.probe_freq, trainer.state
    if freq is None:
        return
    rank, _ = get_dp_rank_and_degree(trainer.mesh)
    # One rank in 128 writes; the others take part, since a sharded model needs them.
    file = Path(trainer.args.dump_dir, "probe", f"probe.{rank}.jsonl") if rank % 128 == 0 else None
    probe = Probe(trainer.model, file)
    # The run that saved the step that this one goes on from may have probed the next already.
    first_key = "layers/grad_norm/0"
    is_done = run_on_rank_0(lambda: is_recorded(metrics.path, state.step, first_key))
    done_step = state.step if is_done else None
    if file is not None:
        mend_jsonl(file, state.step if is_done else state.step - 1)

    def look(batch: Batch) -> None:
        if not every_n_steps(state, freq, acc_step=0) or state.step == done_step:
            return
        x, target, cu_seqlens = batch
        if cu_seqlens is None:  # half the rows: a pass in eager mode takes more memory
            n_rows = max(1, x.shape[0] // 2)
            x, target = x[:n_rows], target[:n_rows]
        probe.metadata = {"it": state.step, "global_step": state.step, "loop": "lt2"}
        numbers = probed_pass(trainer.model, probe, (x, target, cu_seqlens), trainer.mesh)
        trainer.optimizer.zero_grad()
        metrics.log({"global_step": state.step, "acc_step": 0, **numbers})

    trainer.before_micro_batch = look
