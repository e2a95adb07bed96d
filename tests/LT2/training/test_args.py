"""Mistakes in the options of a training run: one line that names the option and its value."""

from __future__ import annotations

import pytest

from apps.LT2.train import save_run_record
from apps.LT2.training.args import TrainArgs, validate_train_args
from apps.LT2.training.unused_options import train_warnings
from lingua.args import parse_args
from lingua.errors import UserError
from tests.lingua.tokenizer_kinds import TOKENIZER_KINDS
from tests.LT2.tiny_run import (
    SMALL,
    column,
    train,
    train_args,
    without_code_copy,
    write_corpus,
)


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
        ("distributed.model_dtype", "fp16"),
        ("async_eval_gpus", 0),
        ("checkpoint.init_ckpt_path", "nowhere"),
    ],
)
def test_a_bad_value_is_a_user_error(data, tmp_path, option, value):
    with pytest.raises(UserError, match=f"{option}={value}"):
        validate_train_args(train_args(data, tmp_path / "run", **{option: value}))
    assert not (tmp_path / "run").exists()


def test_init_ckpt_path_of_a_run_without_readable_steps(data, tmp_path):
    for step in ("0000000002", "0000000010"):
        (tmp_path / "old" / "checkpoints" / step).mkdir(parents=True)
    args = train_args(data, tmp_path / "run", **{"checkpoint.init_ckpt_path": tmp_path / "old"})
    with pytest.raises(UserError, match="checkpoint.init_ckpt_path=.* 2 checkpoints .*0000000010"):
        validate_train_args(args)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"root_dir": "nowhere"}, "eval.validation.root_dir: no .*val.jsonl in nowhere"),
        ({"sources": "[text]"}, "eval.validation.root_dir='' .*eval.validation.sources"),
        ({"root_dir": "nowhere", "sources": "[a]", "max_steps": 1}, "no .*val.jsonl in nowhere/a"),
    ],
)
def test_validation_folders_are_checked_at_the_start(data, tmp_path, options, message):
    options = {f"eval.validation.{name}": value for name, value in options.items()}
    with pytest.raises(UserError, match=message):
        validate_train_args(train_args(data, tmp_path / "run", **options))


def test_held_out_text_that_cannot_be_read_is_refused_at_the_start(tmp_path):
    data = write_corpus(tmp_path / "data")
    (data / "text" / "b.val.jsonl").symlink_to("gone")
    with pytest.raises(UserError, match=r"b\.val\.jsonl .a link to gone"):
        validate_train_args(train_args(data, tmp_path / "run"))
    validate_train_args(train_args(data, tmp_path / "run", **{"eval.validation": None}))


def test_a_tokenizer_without_bos_needs_add_bos_false(data, tmp_path):
    name, path = TOKENIZER_KINDS["metaspace"](tmp_path)
    options = {"data.tokenizer.name": name, "data.tokenizer.path": path}
    with pytest.raises(UserError, match="data.add_bos=true.*data.add_bos=false"):
        validate_train_args(train_args(data, tmp_path / "run", **options))
    options["data.add_bos"] = False
    assert validate_train_args(train_args(data, tmp_path / "run", **options)).data.add_eos


FULL = {"model.mixer": "full", "model.attention_pattern": None}
MISTAKES = {
    "dump_dir is empty": {"dump_dir": ""},
    "model.dim=30": {**FULL, "model.dim": 30, "model.n_heads": 4},
    r"head_dim=.*even": {**FULL, "model.dim": 30},
    "model.attention_pattern": {"model.attention_pattern": "2:x"},
    "data.root_dir=nowhere: no such folder": {"data.root_dir": "nowhere"},
    "data.sources: no folder .*elsewhere": {"data.sources.elsewhere": 1.0},
    "data.tokenizer.path": {"data.tokenizer.name": "hf", "data.tokenizer.path": "no.json"},
    "unknown option eval.validatoin": {"eval.validatoin.max_steps": 3},
    "^eval.validation.max_steps=0": {"eval.validation.max_steps": 0},
    "^eval.generator.max_gen_len=-1": {"eval.generator.max_gen_len": -1},
    "^eval.harness.tasks is empty": {"eval.harness.limit": 3},
    "^eval.harness.stride=0": {"eval.harness.tasks": ["lt2_local"], "eval.harness.stride": 0},
    "unknown option eval.validation.max_step;": {"eval.validation.max_step": 3},
    "unknown option modle": {"modle.dim": 64},
    "steps=1.5": {"steps": 1.5},
    "model.max_seqlen=16 contradicts data.seq_len=32": {"model.max_seqlen": 16},
    "distributed.dp_shard=2": {"distributed.dp_shard": 2, "distributed.fsdp_type": "full_shard"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line(data, tmp_path, message):
    with pytest.raises(UserError, match=message) as refused:
        changes = {"dump_dir": tmp_path / "run", **MISTAKES[message]}
        validate_train_args(train_args(data, changes.pop("dump_dir"), **changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, message", [("", "is empty"), ("{}\n", ":1: no string under")])
def test_a_bad_chunk_is_a_user_error(tmp_path, text, message):
    root = write_corpus(tmp_path / "data")
    (root / "text" / "text.chunk.01.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"text.chunk.01.jsonl ?{message}"):
        validate_train_args(train_args(root, tmp_path / "run"))


def test_numbers_may_be_written_as_floats(data, tmp_path):
    steps = validate_train_args(train_args(data, tmp_path, steps="1e5")).steps
    assert steps == 100_000 and isinstance(steps, int)


def test_seed_is_the_default_of_the_other_seeds(data, tmp_path):
    def seeds(**changes):
        args = validate_train_args(train_args(data, tmp_path, **changes))
        return args.seed, args.model.seed, args.data.seed

    assert seeds(seed=5) == (5, 5, 5)
    assert seeds(seed=5, **{"model.seed": 6}) == (5, 6, 5)
    assert seeds(seed=5, **{"data.seed": 0}) == (5, 5, 0)


def test_defaults_are_filled_in_a_copy(data, tmp_path):
    given = train_args(data, tmp_path, **{"model.max_seqlen": 4096})
    filled = validate_train_args(given)
    assert (filled.model.vocab_size, filled.model.max_seqlen) == (258, 32)
    assert filled.checkpoint.path == str(tmp_path / "checkpoints")
    assert (given.model.vocab_size, given.model.seed, given.checkpoint.path) == (-1, None, None)


def test_config_yaml_with_another_dump_dir_is_another_run(data, tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    given = train_args(data, run)
    with without_code_copy():
        save_run_record(validate_train_args(given), given, 0)
    copy = parse_args(TrainArgs, [f"config={run / 'config.yaml'}", f"dump_dir={tmp_path / 'b'}"])
    assert validate_train_args(copy).checkpoint.path == str(tmp_path / "b" / "checkpoints")


def test_without_a_named_source_training_reads_root_dir(tmp_path):
    data = write_corpus(tmp_path / "data")
    named = train(data, tmp_path / "named", steps=3, **SMALL)
    options = {**SMALL, "data.sources": "{}"}
    alone = train(data / "text", tmp_path / "alone", steps=2, **options)
    train(data / "text", alone, steps=3, **options)  # resumes
    log = (alone / "train.log").read_text()
    assert f"data     {data}/text\n" in log and "not those in its folders" not in log
    assert "  .: 1.0\n" in (alone / "config.yaml").read_text()
    for key in ("loss/out", "loss/val"):
        assert column(alone, key)[-1] == column(named, key)[-1]
    (data / "text" / "inner").mkdir()
    args = validate_train_args(train_args(data / "text", tmp_path, **options))
    assert not [w for w in train_warnings(args) if "inner" in w]
    (data / "text" / "inner" / "a.chunk.0.jsonl").write_text("{}")
    assert [w for w in train_warnings(args) if w.startswith("data.sources") and "inner" in w]
