"""What a user of Meta Lingua brings along: checkpoints, run folders, data states and imports."""

from __future__ import annotations

import importlib
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from apps.LT2.generate import load_consolidated_model_and_tokenizer
from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.scripts.export_weights import ExportArgs, export
from apps.LT2.training.args import TrainArgs
from apps.LT2.training.unused_options import train_warnings
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.checkpointing.weights import load_initial_weights
from lingua.data import build_dataloader_from_args
from lingua.errors import UserError
from lingua.transformer import TiedLinear
from tests.LT2.lingua_run import SHAPE, VOCAB, LinguaModel, data_state, write_lingua_run
from tests.LT2.tiny_run import SMALL, column, train, train_args

TOKENS = torch.tensor([[256, *b"what is asked"]])


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def lingua(request, tmp_path_factory) -> tuple[Path, LinguaModel]:
    folder = tmp_path_factory.mktemp("lingua")
    return folder, write_lingua_run(folder, folder / "data", weight_tying=request.param)


def step_folder(run: Path) -> Path:
    return run / "checkpoints" / "0000000002"


def as_one_file(run: Path) -> Path:
    """Do what Lingua's consolidate_checkpoints does."""
    folder = step_folder(run) / "consolidated"
    if not folder.exists():
        folder.mkdir()
        dcp_to_torch_save(step_folder(run), folder / "consolidated.pth")
        (folder / "params.json").write_bytes((step_folder(run) / "params.json").read_bytes())
    return folder


@pytest.mark.parametrize("form", [lambda run: run, step_folder, as_one_file])
def test_a_checkpoint_gives_the_same_logits(form, lingua, caplog):
    run, model = lingua
    loaded = load_model_and_tokenizer(str(form(run)), dtype="fp32", device="cpu").model
    torch.testing.assert_close(loaded(TOKENS), model.logits(TOKENS), rtol=1e-5, atol=1e-5)
    assert not loaded.rho.any() and caplog.text.count("has no rho") == 1
    assert "not loaded" not in caplog.text


def test_a_window_that_lingua_ignored_is_ignored(data, tmp_path, caplog):
    model = write_lingua_run(tmp_path, data)
    file = step_folder(tmp_path) / "params.json"
    file.write_text(file.read_text().replace('"sliding_window": null', '"sliding_window": 3'))
    loaded = load_model_and_tokenizer(str(tmp_path), dtype="fp32", device="cpu").model
    torch.testing.assert_close(loaded(TOKENS), model.logits(TOKENS), rtol=1e-5, atol=1e-5)
    assert "model.sliding_window=3" in caplog.text


def test_the_names_of_lingua_load_it_too(lingua):
    model, tokenizer, config = load_consolidated_model_and_tokenizer(str(as_one_file(lingua[0])))
    assert model.args.dim == 32 and tokenizer.n_words == VOCAB and config["name"] == "lingua"


def test_an_exported_checkpoint_loads(lingua, tmp_path):
    run, model = lingua
    export(ExportArgs(ckpt=str(run), format="consolidated", out=str(tmp_path / "out")))
    loaded = load_model_and_tokenizer(str(tmp_path / "out"), dtype="fp32", device="cpu").model
    torch.testing.assert_close(loaded(TOKENS), model.logits(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [step_folder, as_one_file])
@pytest.mark.parametrize("loop_count", [1, 3])
def test_a_looped_model_starts_from_it_with_gates_of_zero(form, loop_count, lingua, caplog):
    run, theirs = lingua
    tied = isinstance(theirs.output, TiedLinear)
    args = LoopedTransformerArgs(
        **SHAPE, vocab_size=VOCAB, loop_count=loop_count, weight_tying=tied
    )
    model = LoopedTransformer(args)
    nn.init.ones_(model.rho)
    load_initial_weights(str(form(run)), model, ("rho",))
    assert not model.rho.any() and caplog.text.count("has no rho") == 1
    names = dict(theirs.named_parameters())
    assert all(torch.equal(p, names[n]) for n, p in model.named_parameters() if n != "rho")
    with pytest.raises(UserError, match="rho"):
        load_initial_weights(str(form(run)), model)


OPTIONS = {**SMALL, **{f"model.{name}": SHAPE[name] for name in ("n_layers", "multiple_of")}}


def test_a_run_starts_from_it(data, tmp_path):
    write_lingua_run(tmp_path / "lingua", data)
    source = step_folder(tmp_path / "lingua")
    options = {**OPTIONS, "model.weight_tying": False, "checkpoint.init_ckpt_path": source}
    run = train(data, tmp_path / "run", **options, steps=1)
    assert len(column(run, "loss/out")) == 1

    before = sorted((tmp_path / "lingua").rglob("*"))
    for dump_dir, more in (("lingua", {}), ("other", {"checkpoint.path": source.parent})):
        with pytest.raises(UserError, match=f"checkpoint.init_ckpt_path={source}"):
            train(data, tmp_path / dump_dir, **options | more)
    assert sorted((tmp_path / "lingua").rglob("*")) == before

    more = {"checkpoint.continue_training_from_init": True}
    with pytest.raises(UserError, match=r"train_state_00000.json is a data state of Meta Lingua"):
        train(data, tmp_path / "other", **options | more)
    assert not (tmp_path / "other").exists()


def test_its_data_state_is_rejected_by_name(data, tmp_path):
    args = train_args(data, tmp_path, **OPTIONS).data
    with pytest.raises(UserError, match="data state of Meta Lingua"):
        build_dataloader_from_args(args, data_state(data))


@pytest.mark.parametrize(
    "module, names",
    [
        (
            "apps.LT2.transformer",
            "LMTransformer LMTransformerArgs build_fsdp_grouping_plan tp_parallelize "
            "get_no_recompute_ops",
        ),
        (
            "apps.LT2.generate",
            "PackedCausalTransformerGenerator PackedCausalTransformerGeneratorArgs sample_tokens "
            "pack_prompts load_consolidated_model_and_tokenizer",
        ),
        ("apps.LT2.eval", "EvalArgs LMHarnessArgs ValidationArgs EvalHarnessLM launch_eval"),
        ("apps.LT2.train", "TrainState TrainArgs every_n_steps validate_train_args"),
        ("lingua.transformer", "TiedLinear InitStdFactor cross_entropy repeat_kv"),
        ("lingua.probe", "AutoProbeD Probe log_stats"),
        (
            "lingua.checkpoint",
            "CheckpointArgs CheckpointManager load_from_checkpoint consolidate_checkpoints",
        ),
    ],
)
def test_names_import(module, names):
    found = importlib.import_module(module)
    assert all(callable(getattr(found, name)) for name in names.split())
    with pytest.raises(AttributeError):
        _ = found.no_such_name


def test_a_tied_head_has_no_weight_of_its_own():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3)})
    model["output"] = TiedLinear(model["embedding"])
    copied = deepcopy(model)
    assert list(copied.state_dict()) == ["embedding.weight"]
    nn.init.ones_(copied["embedding"].weight)
    assert torch.equal(copied["output"](torch.ones(2, 3)), torch.full((2, 5), 3.0))
    seen = []
    copied["output"].register_forward_hook(lambda *_: seen.append(1))
    copied["output"](torch.ones(3)).sum().backward()
    assert seen and copied["embedding"].weight.grad.sum() == 15


@pytest.mark.parametrize(
    "options, warns",
    [
        ({"init_std_factor": "dim_ratio"}, True),
        ({"init_std_factor": "dim_ratio", "init_base_std": 0.02}, True),
        ({"init_std_factor": "dim_ratio", "dim": 4096}, False),
        ({"init_std_factor": "global_depth"}, False),
        ({"init_std_factor": "current_depth"}, False),
        ({}, False),
    ],
)
def test_a_wide_initialization_warns(options, warns):
    args = TrainArgs(dump_dir="run", model=LoopedTransformerArgs(**SHAPE | options))
    found = any("model.init_std_factor=dim_ratio" in w for w in train_warnings(args))
    assert found == warns
