"""Options of Lingua and of older versions load with one warning each."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from lingua.args import dataclass_from_dict, dataclass_to_dict, diff_configs, parse_args
from lingua.config import ignored
from lingua.config.help import walk_fields
from lingua.errors import UserError
from lingua.metrics import LoggingArgs, WandbArgs
from lingua.optim import OptimArgs
from lingua.parallel.args import DistributedArgs


@dataclass
class Args:
    optim: OptimArgs = field(default_factory=OptimArgs)
    distributed: DistributedArgs = field(default_factory=DistributedArgs)
    logging: LoggingArgs = field(default_factory=LoggingArgs)


OLD = {
    "optim": {"lr": 1e-3, "annealing_step": 1000},
    "distributed": {"float8_recipe": "rowwise", "float8_filter": r"layers\.[0-9]+\."},
    "logging": {"wandb": {"project": "p", "anonymous": "allow", "monitor_gym": None}},
}


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ignored._warn.cache_clear()


def test_ignored_options_load_with_one_warning_each(caplog):
    want = Args(optim=OptimArgs(lr=1e-3), logging=LoggingArgs(wandb=WandbArgs(project="p")))
    for _ in range(2):
        assert dataclass_from_dict(Args, OLD) == want
    names = {message.split()[0] for message in caplog.messages}
    assert names == {
        "optim.annealing_step",
        "distributed.float8_recipe",
        "distributed.float8_filter",
        "logging.wandb.anonymous",
    }, "null is not worth a warning"
    assert len(caplog.messages) == len(names)


def test_ignored_options_on_the_command_line(caplog, monkeypatch):
    argv = ["distributed.float8_recipe=rowwise", "optim.annealing_step=null", "optim.lr=1e-3"]
    assert parse_args(Args, argv) == Args(optim=OptimArgs(lr=1e-3))
    (warning,) = caplog.messages
    assert "distributed.float8_recipe is ignored" in warning
    monkeypatch.setenv("RANK", "1")
    parse_args(Args, ["distributed.float8_filter=x"])
    assert len(caplog.messages) == 1, "only rank 0 warns"


def test_other_unknown_options_are_errors():
    for section, option in (("optim", "float8_recipe"), ("distributed", "float8_recip")):
        with pytest.raises(UserError, match=rf"{section}\.{option}"):
            dataclass_from_dict(Args, {section: {option: "x"}})


def test_ignored_options_are_not_differences():
    now = dataclass_to_dict(Args(optim=OptimArgs(lr=2e-3)))
    saved = dataclass_to_dict(Args())
    saved["optim"] |= {"lr": 1e-3, "annealing_step": 1000, "gone": 1}
    differences = ["optim.gone: 1 -> (absent)", "optim.lr: 0.001 -> 0.002"]
    assert diff_configs(saved, now) == differences


def test_no_ignored_option_exists():
    options = {doc.path for doc in walk_fields(Args)}
    assert not [name for name in options if ignored.why_ignored(name)]
