"""What a training run refuses before any work: one line that names the option and its value."""

from __future__ import annotations

import pytest

from apps.LT2.train_args import validate_train_args
from lingua.args import UserError
from tests.LT2.tiny_run import train_args, write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    "option, value",
    [
        ("steps", 0),
        ("grad_acc_steps", 0),
        ("gc_collect_freq", -1),
        ("probe_freq", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("model.seed", -1),
        ("data.seed", 2**64),
        ("model.vocab_size", -7),
        ("model.vocab_size", 10),
        ("data.n_views", 3),
        ("distributed.tp_size", 2),
        ("async_eval_gpus", 1),
        ("checkpoint.init_ckpt_path", "nowhere"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(data, tmp_path, option, value):
    with pytest.raises(UserError, match=f"{option}={value}"):
        validate_train_args(train_args(data, tmp_path / "run", **{option: value}))
    assert not (tmp_path / "run").exists()
