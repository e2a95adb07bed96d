"""Log the metrics of a run as JSON lines in its dump directory, and to wandb or tensorboard.

    with MetricLogger(dump_dir / "metrics.jsonl", args, resume_step=state.step) as metric_logger:
        metric_logger.log({"global_step": 10, "loss": {"out": 2.3}})  # -> "loss/out"

A run that resumes from step s removes the records after s, because it trains those steps again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections import ChainMap, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lingua.args import dataclass_to_dict, flatten_dict, load_config_file
from lingua.errors import UserError, import_optional
from lingua.evaluations import UNKNOWN, read_evaluations
from lingua.files.atomic import write_atomic
from lingua.files.jsonl_log import RecordFile, json_line, read_jsonl_records, repair_jsonl
from lingua.parallel.ranks import get_is_master
from lingua.redact import redact_all

logger = logging.getLogger(__name__)

WANDB_ID_FILE = "wandb_id.txt"
GIB = 1024**3


@dataclass
class WandbArgs:
    """Arguments of wandb.init. null keeps the default of wandb."""

    job_type: str | None = None  # kind of run, such as train or eval
    dir: str | None = None  # folder for the files of wandb; null = dump_dir
    project: str | None = None  # project of the run
    entity: str | None = None  # user or team that owns the project
    tags: list[str] | None = None  # labels to filter runs by
    group: str | None = None  # group that wandb shows together
    name: str | None = None  # display name; null = the run's `name`
    notes: str | None = None  # longer description
    config_exclude_keys: list[str] | None = None  # options not to upload
    config_include_keys: list[str] | None = None  # the only options to upload
    mode: str | None = None  # online, offline or disabled
    allow_val_change: bool | None = None  # allow a changed config in a resumed run
    resume: str | None = None  # allow, never, must or auto; null = allow
    force: bool | None = None  # true requires a login
    sync_tensorboard: bool | None = None  # upload the tensorboard files
    save_code: bool | None = None  # upload the main script
    id: str | None = None  # id of the run; null = created once and kept in dump_dir
    fork_from: str | None = None  # `id?_step=n`: fork that run at step n
    resume_from: str | None = None  # `id?_step=n`: rewind that run to step n


@dataclass
class LoggingArgs:
    freq: int = 10  # optimizer steps between records
    acc_freq: int | None = None  # micro-batches between records inside a step; null = none
    wandb: WandbArgs | None = None  # null = no wandb
    tensorboard: bool = False  # true also writes event files to dump_dir/tensorboard

    def __post_init__(self):
        if self.freq < 1:
            raise UserError(f"logging.freq={self.freq} must be at least 1")
        if self.acc_freq is not None and self.acc_freq < 1:
            raise UserError(f"logging.acc_freq={self.acc_freq} must be at least 1, or null")


class MetricLogger:
    """Write records on rank 0. Other ranks do nothing.

    `args` is the config of the run, with a LoggingArgs `args.logging`. None writes only the file.
    `resume_step` is the step that the run resumes from. None keeps all existing records.
    `facts` of the run, such as its parameters, are added to its first record and to wandb's config.
    A resumed run records facts that are new or have changed.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        args: Any = None,
        *,
        resume_step: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ):
        self.path = Path(path)
        self.args = args
        self.resume_step = resume_step
        self.facts = dict(facts or {})
        self.file: RecordFile | None = None
        self.wandb_run: Any = None
        self.tensorboard: Any = None

    def __enter__(self) -> MetricLogger:
        if not get_is_master():
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        repair_jsonl(self.path, self.resume_step)
        options = self.args.logging if self.args is not None else LoggingArgs()
        if options.wandb is not None:
            self.wandb_run = start_wandb(options.wandb, self.args, self.path.parent, self.facts)
        if options.tensorboard:
            self.tensorboard = _start_tensorboard(self.path.parent, self.resume_step)
        self.path.touch()  # plots may read it before the first record
        if self.facts:
            known = ChainMap(*reversed(read_jsonl_records(self.path)))
            self.facts = {k: v for k, v in self.facts.items() if known.get(k) != v}
        self.file = RecordFile(self.path)
        return self

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Write one record. Nested mappings become keys with slashes."""
        if not get_is_master():
            return
        assert self.file is not None, "MetricLogger.log outside of `with`"
        record = flatten_dict(metrics, sep="/") | self.facts
        self.facts = {}
        self.file.append({"created_at": datetime.now(UTC).isoformat(), **record})
        self.send(record)

    def send(self, record: Mapping[str, Any]) -> None:
        """Send a flat record to wandb and tensorboard, without a line in the file."""
        step = record.get("global_step")
        if self.wandb_run is not None:
            self.wandb_run.log(dict(record), step=step)
        if self.tensorboard is None:
            return
        try:
            for name, value in json.loads(json_line(record)).items():
                if isinstance(value, int | float) and name != "global_step":
                    self.tensorboard.add_scalar(name, value, step)
        except OSError as error:
            self._give_up_tensorboard(error)

    def _give_up_tensorboard(self, error: OSError) -> None:
        """Stop writing event files: the error has ended the writer's thread."""
        self.tensorboard = None
        logger.warning(
            "%s/tensorboard cannot be written (%s) and is now incomplete; %s gets all records",
            *(self.path.parent, error.strerror or error, self.path.name),
        )

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        if self.file is not None:
            self.file.close()
        try:
            if self.tensorboard is not None:
                self.tensorboard.close()
        except OSError as error:
            self._give_up_tensorboard(error)
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=0 if exc_type is None else 1)


# ---- wandb and tensorboard


def check_logging_packages(options: LoggingArgs) -> None:
    """Raise UserError on every rank if a package that `logging` needs is missing."""
    if options.wandb is not None:
        import_optional("wandb", extra="wandb", needed_by="logging.wandb")
    if options.tensorboard:
        import_optional("tensorboard", extra="tensorboard", needed_by="logging.tensorboard=true")


def start_wandb(
    options: WandbArgs, config: Any, dump_dir: Path, facts: Mapping[str, Any] | None = None
) -> Any:
    """Start a wandb run, or resume the one whose id is in `dump_dir`."""
    wandb = import_optional("wandb", extra="wandb", needed_by="logging.wandb")
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    given = {name: value for name, value in given.items() if value is not None}
    given.setdefault("dir", str(dump_dir))
    if run_name := getattr(config, "name", None):
        given.setdefault("name", run_name)
    id_file = dump_dir / WANDB_ID_FILE
    if id_file.exists():  # fork and rewind only when the run starts
        given = {n: v for n, v in given.items() if n not in ("fork_from", "resume_from")}
        given.setdefault("id", id_file.read_text().strip())
    if not {"fork_from", "resume_from"} & given.keys():  # wandb forbids these with `resume`
        given.setdefault("id", uuid.uuid4().hex[:8])
        given.setdefault("resume", "allow")
    all_config = redact_all(dataclass_to_dict(config)) | dict(facts or {})
    run = _init_wandb(wandb, config=all_config, **given)
    write_atomic(id_file, run.id)
    return run


def _init_wandb(wandb: Any, **options: Any) -> Any:
    try:
        return wandb.init(**options)
    except wandb.Error as error:
        raise UserError(
            f"logging.wandb: wandb could not start: {error}; run `wandb login`, or use "
            "logging.wandb.mode=offline or logging.wandb=null"
        ) from None


def _start_tensorboard(dump_dir: Path, resume_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    purge_step = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(dump_dir / "tensorboard"), purge_step=purge_step, flush_secs=30)


def upload_train_to_wandb(
    ckpt_dir: str | os.PathLike,
    project: str = "lingua",
    entity: str | None = None,
    train: bool = True,
    eval: bool = True,
) -> None:
    """Upload the records of a run to wandb afterwards. `ckpt_dir` is its dump directory.

    Scores with the run's own options are `evals/<task>/...`, others `evals/<options>/<task>/...`.
    """
    wandb = import_optional("wandb", extra="wandb", needed_by="upload_train_to_wandb")
    folder = Path(ckpt_dir)
    config = load_config_file(folder / "config.yaml")
    records = read_jsonl_records(folder / "metrics.jsonl") if train else []
    if eval:
        for evaluation in read_evaluations(folder):
            is_own = evaluation.label in ("", UNKNOWN)  # older records have always been `evals/`
            prefix = "evals" if is_own else f"evals/{evaluation.label}"
            scores = {f"{prefix}/{name}": score for name, score in evaluation.scores.items()}
            records.append({"global_step": evaluation.step, **scores})
    run = _init_wandb(wandb, config=config, name=config.get("name"), project=project, entity=entity)
    for record in sorted(records, key=lambda r: r.get("global_step") or 0):  # wandb: rising
        run.log(record, step=record.get("global_step"))
    run.finish()


# ---- the device

GPUMemStats = namedtuple(
    "GPUMemStats",
    "max_active_gib max_active_pct max_reserved_gib max_reserved_pct "
    "num_alloc_retries num_ooms power_draw",
)


class GPUMemoryMonitor:
    """Peak memory of one CUDA device since the last reset. On CPU it has no metrics."""

    def __init__(self, device: str | torch.device = "cuda"):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            self.name, self.capacity = properties.name, properties.total_memory
            self.reset_peak_stats()
        else:
            self.name, self.capacity = self.device.type, 0

    def reset_peak_stats(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def get_peak_stats(self) -> GPUMemStats | None:
        """Return the peaks, or None on CPU. `power_draw` is in milliwatts, None if unknown."""
        if self.device.type != "cuda":
            return None
        stats = torch.cuda.memory_stats(self.device)
        active = stats.get("active_bytes.all.peak", 0)
        reserved = stats.get("reserved_bytes.all.peak", 0)
        return GPUMemStats(
            active / GIB,
            100 * active / self.capacity,
            reserved / GIB,
            100 * reserved / self.capacity,
            stats.get("num_alloc_retries", 0),
            stats.get("num_ooms", 0),
            _power_draw(self.device),
        )

    def metrics(self) -> dict[str, float]:
        """Return the known peaks under `memory/...` keys."""
        stats = self.get_peak_stats()
        known = {} if stats is None else stats._asdict()
        return {f"memory/{name}": value for name, value in known.items() if value is not None}


def _power_draw(device: torch.device) -> int | None:
    try:
        return torch.cuda.power_draw(device)
    except (ImportError, RuntimeError, OSError):  # no pynvml, or no sensor
        return None


def get_num_params(model: nn.Module) -> int:
    """Count the parameters of the whole model: shared ones once, sharded ones in full."""
    return sum(p.numel() for p in model.parameters())


# Dense TFLOP/s in bf16 and fp16 with fp32 accumulation, without sparsity, from NVIDIA's data
# sheets. A row matches if all its words are in the device's name; the longest match wins.
PEAK_BF16_TFLOPS = {
    "A10": 125.0,
    "A30": 165.0,
    "A40": 149.7,
    "A100": 312.0,
    "A800": 312.0,
    "L4": 121.0,
    "L40": 181.05,
    "L40S": 362.05,
    "H20": 148.0,
    "H100": 989.4,
    "H100 PCIE": 756.0,
    "H100 NVL": 835.5,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "H800": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "GB200": 2500.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
    "RTX A6000": 154.8,
}
OTHER_CHIPS = {"MIG", "LAPTOP", "MAX-Q", "D", "TI"}  # slices and variants with other peaks


def peak_flops(device_name: str, dtype: torch.dtype | str = "bf16") -> float | None:
    """Return the dense peak FLOP/s of the device in bf16 or fp16, or None if unknown."""
    if str(dtype).removeprefix("torch.") not in ("bf16", "fp16", "bfloat16", "float16"):
        return None
    words = set(re.split(r"[\s_-]+", device_name.upper()))
    rows = [row for row in PEAK_BF16_TFLOPS if set(row.split()) <= words]
    if not rows or words & OTHER_CHIPS:
        return None
    return PEAK_BF16_TFLOPS[max(rows, key=len)] * 1e12
