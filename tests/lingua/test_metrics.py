"""metrics.jsonl is strict JSON without repeated steps; restarts resume the same wandb run."""

import json
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lingua.args import dataclass_from_dict, dump_config
from lingua.errors import UserError
from lingua.metrics import (
    GPUMemoryMonitor,
    LoggingArgs,
    MetricLogger,
    WandbArgs,
    check_logging_packages,
    get_num_params,
    peak_flops,
    upload_train_to_wandb,
)


@dataclass
class Args:
    name: str = "my-run"
    logging: LoggingArgs = field(default_factory=LoggingArgs)


def log_steps(path, steps, resume_step=None, args=None, acc_step=0):
    with MetricLogger(path, args, resume_step=resume_step) as metric_logger:
        for step in steps:
            record = {"global_step": step, "acc_step": acc_step, "loss": {"out": float(step)}}
            metric_logger.log(record)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_in(path):
    return [record["global_step"] for record in records(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dump" / "metrics.jsonl"


def test_records_are_flat_strict_json_and_written_at_once(path):
    with MetricLogger(path) as metric_logger:
        metric_logger.log(
            {
                "global_step": 1,
                "loss": {"out": torch.tensor(0.5)},
                "optim/grad_norm": float("nan"),
                "speed/mfu": float("inf"),
            }
        )
        (record,) = records(path)  # before the file is closed
    assert record.pop("created_at").endswith("+00:00")
    assert record == {
        "global_step": 1,
        "loss/out": 0.5,
        "optim/grad_norm": None,
        "speed/mfu": None,
    }


def test_facts_are_recorded_once_and_again_if_they_change(path, wandb):
    for step, layout in ((1, "gF"), (2, "gF"), (3, "gg")):
        facts = {"model/layout": layout, "model/parameters": 7}
        with MetricLogger(path, with_wandb(project="p"), facts=facts) as metric_logger:
            metric_logger.log({"global_step": step})
    recorded = [{k: v for k, v in r.items() if k.startswith("model/")} for r in records(path)]
    assert recorded == [{"model/layout": "gF", "model/parameters": 7}, {}, {"model/layout": "gg"}]
    assert wandb.runs[0].options["config"]["model/layout"] == "gF"


def test_resume_drops_the_steps_that_repeat(path):
    log_steps(path, [10, 20, 30, 40])
    log_steps(path, [30, 40, 50], resume_step=20)
    assert steps_in(path) == [10, 20, 30, 40, 50]
    log_steps(path, [10], resume_step=0)
    assert steps_in(path) == [10]


def test_resume_drops_micro_steps_after_the_checkpoint(path):
    log_steps(path, [10])
    log_steps(path, [10], acc_step=2)
    log_steps(path, [], resume_step=10)
    assert [(r["global_step"], r["acc_step"]) for r in records(path)] == [(10, 0)]


def test_all_records_are_kept_without_resume_step(path):
    log_steps(path, [10, 20])
    log_steps(path, [10])
    assert steps_in(path) == [10, 20, 10]


@pytest.mark.parametrize("resume_step", [None, 100])
@pytest.mark.parametrize("tail", ['{"global_step": 3, "lo', '{"a": 1}\n{"global_step"', "\x00\x00"])
def test_half_written_last_line_is_removed(path, tail, resume_step):
    log_steps(path, [1, 2])
    before = path.read_text()
    path.write_text(before + tail)
    log_steps(path, [3], resume_step=resume_step)
    lines = path.read_text().splitlines()
    assert lines[:2] == before.splitlines()
    assert json.loads(lines[-1])["global_step"] == 3
    assert len(lines) == 3 + tail.count("\n")


def test_invalid_lines_before_the_last_are_kept(path):
    path.parent.mkdir()
    path.write_text('a note\n{"global_step": "x"}\n{"global_step": 1}\n')
    log_steps(path, [2], resume_step=1)
    note, odd, *lines = path.read_text().splitlines()
    assert (
        note == "a note"
        and odd == '{"global_step": "x"}'
        and [json.loads(line)["global_step"] for line in lines] == [1, 2]
    )


def test_complete_last_line_without_newline_is_kept(path):
    log_steps(path, [1, 2])
    path.write_text(path.read_text().rstrip("\n"))
    log_steps(path, [3])
    assert steps_in(path) == [1, 2, 3]


def test_other_ranks_write_nothing(path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    log_steps(path, [1], args=Args(logging=LoggingArgs(wandb=WandbArgs())))
    assert not path.exists()


# ---- wandb


class FakeRun:
    def __init__(self, options):
        self.options = options
        self.id = options.get("id", "made-by-wandb")
        self.logged = []
        self.exit_code = None

    def log(self, record, step=None):
        self.logged.append((step, record))

    def finish(self, exit_code=0):
        self.exit_code = exit_code


class FakeWandb(SimpleNamespace):
    class Error(Exception):
        pass

    def init(self, **options):
        if options.get("entity") == "nobody":
            raise self.Error("no such entity")
        self.runs.append(FakeRun(options))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb(runs=[])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def with_wandb(**options):
    return Args(logging=LoggingArgs(wandb=WandbArgs(**options)))


def test_wandb_resumes_the_same_run(path, wandb):
    log_steps(path, [1], args=with_wandb(project="p", tags=["a"]))
    log_steps(path, [2], resume_step=1, args=with_wandb(project="p"))
    first, second = (run.options for run in wandb.runs)
    assert first["id"] == second["id"] and len(first["id"]) == 8
    assert first["resume"] == second["resume"] == "allow"
    assert first["project"] == "p" and first["tags"] == ["a"] and first["name"] == "my-run"
    assert first["config"]["logging"]["freq"] == 10
    assert first["dir"] == str(path.parent)
    assert "entity" not in first  # null keeps the default of wandb
    (logged,) = wandb.runs[0].logged
    assert logged[0] == 1 and logged[1]["loss/out"] == 1.0
    assert wandb.runs[0].exit_code == 0


def test_wandb_uses_given_id_and_name(path, wandb):
    given = {"id": "mine", "name": "shown", "resume": "must"}
    log_steps(path, [], args=with_wandb(**given))
    assert given.items() <= wandb.runs[0].options.items()


def test_wandb_forks_once(path, wandb):
    for _ in range(2):
        log_steps(path, [], args=with_wandb(fork_from="abc?_step=5"))
    first, second = (run.options for run in wandb.runs)
    assert first["fork_from"] == "abc?_step=5" and not {"id", "resume"} & first.keys()
    assert "fork_from" not in second
    assert (second["id"], second["resume"]) == ("made-by-wandb", "allow")


def test_wandb_gets_the_exit_code(path, wandb):
    with pytest.raises(RuntimeError), MetricLogger(path, with_wandb()):
        raise RuntimeError
    assert wandb.runs[0].exit_code == 1


def test_wandb_start_failure_is_a_user_error(path, wandb):
    with pytest.raises(UserError, match="logging.wandb: .*no such entity"):
        log_steps(path, [], args=with_wandb(entity="nobody"))


def test_missing_wandb_is_a_user_error(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging.wandb needs .*'\.\[wandb\]'"):
        log_steps(path, [], args=with_wandb())
    with pytest.raises(UserError, match="logging.wandb needs"):
        check_logging_packages(LoggingArgs(wandb=WandbArgs()))
    check_logging_packages(LoggingArgs())


def test_upload_sorts_records_by_step(path, wandb):
    log_steps(path, [10, 20])
    dump_config(Args(), path.parent / "config.yaml", log_config=False)
    scores = {"created_at": "x", "global_step": 10, "arc": {"acc": 0.5, "alias": "arc"}}
    (path.parent / "metrics.eval.jsonl").write_text(json.dumps(scores) + '\n{"half')
    upload_train_to_wandb(path.parent, project="p")
    (run,) = wandb.runs
    assert [step for step, _ in run.logged] == [10, 10, 20]
    assert run.logged[1][1] == {"global_step": 10, "evals/arc/acc": 0.5}
    assert run.options["name"] == "my-run" and run.exit_code == 0


def test_upload_keeps_results_with_other_options_apart(path, wandb):
    log_steps(path, [10])
    dump_config(Args(), path.parent / "config.yaml", log_config=False)
    lines = []
    for score, differs in ((0.5, {}), (0.25, {"loop_count": 4}), (0.125, {"harness.limit": 8})):
        record = {"global_step": 10, "made_with": {"loop_count": 1}, "differs_from_run": differs}
        lines.append(json.dumps(record | {"arc": {"acc": score}, "chance": {"arc": {"acc": 0.2}}}))
    (path.parent / "metrics.eval.jsonl").write_text("\n".join(lines))
    upload_train_to_wandb(path.parent, project="p")
    logged = [record for _, record in wandb.runs[0].logged[1:]]
    assert logged == [
        {"global_step": 10, "evals/arc/acc": 0.5},
        {"global_step": 10, "evals/loop_count=4/arc/acc": 0.25},
        {"global_step": 10, "evals/limit=8/arc/acc": 0.125},
    ]


def test_tensorboard_gets_all_numbers(path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = Args(logging=LoggingArgs(tensorboard=True))
    log_steps(path, [1, 2, 3], args=args)
    log_steps(path, [2], resume_step=1, args=args)
    events = EventAccumulator(str(path.parent / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/out")] == [(1, 1.0), (2, 2.0)]


def test_failed_tensorboard_write_does_not_end_the_run(path, caplog):
    pytest.importorskip("tensorboard")
    args = Args(logging=LoggingArgs(tensorboard=True))
    with MetricLogger(path, args) as metric_logger:
        metric_logger.tensorboard.file_writer.event_writer.close()  # writes now raise OSError
        for step in (1, 2):
            metric_logger.log({"global_step": step, "loss/out": 1.0})
    assert steps_in(path) == [1, 2]
    (warning,) = (m for m in caplog.messages if "tensorboard" in m)
    assert "tensorboard cannot be written" in warning


# ---- options and numbers


def test_options_are_checked():
    args = dataclass_from_dict(Args, {"logging": {"wandb": {"project": "p"}}})
    assert args.logging.wandb == WandbArgs(project="p")
    with pytest.raises(UserError, match="did you mean logging.wandb.project?"):
        dataclass_from_dict(Args, {"logging": {"wandb": {"projet": "p"}}})
    with pytest.raises(UserError, match="logging.freq=0"):
        LoggingArgs(freq=0)
    with pytest.raises(UserError, match="logging.acc_freq=0"):
        LoggingArgs(acc_freq=0)


def test_cpu_has_no_memory_metrics():
    monitor = GPUMemoryMonitor("cpu")
    monitor.reset_peak_stats()
    assert monitor.get_peak_stats() is None
    assert monitor.metrics() == {}


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 3), nn.Linear(5, 3))
    model[2].weight = model[1].weight
    assert get_num_params(model) == 15 + 15 + 3 + 3


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peak_flops_of_known_devices(name, tflops):
    assert peak_flops(name, "bf16") == peak_flops(name, torch.float16) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A10G",
        "cpu",
    ],
)
def test_peak_flops_of_other_devices_is_unknown(name):
    assert peak_flops(name) is None


def test_peak_flops_of_other_types_is_unknown():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None
